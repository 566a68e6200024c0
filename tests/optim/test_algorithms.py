"""SGD and Adam: the numbers of fastai, who takes a step, and which forms of torch do the work."""

import copy
import math

import pytest
import torch
from torch import nn

from learnloop.optim.algorithms import SGD, Adam


def parameters(dtype=torch.float32):
    shapes = [(2, 3), (3,), (3, 1), (1,)]
    flat = [torch.cos(torch.arange(math.prod(s), dtype=torch.float32) * 1.3 + i) for i, s in enumerate(shapes)]
    return [nn.Parameter(f.reshape(s).to(dtype)) for f, s in zip(flat, shapes, strict=True)]


def give_gradients(params, i):
    for j, p in enumerate(params):
        waves = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape) * 0.7 + i * 0.9 + j
        p.grad = (torch.sin(waves) * (j + 1)).to(p.dtype)


def trained(make, hypers, each=None, steps=20):
    """Values after 20 steps of two groups; a bias without decay, a matrix without gradient at first."""
    params = parameters()
    opt = make([params[:2], params[2:]])
    opt.set_hypers(**hypers)
    opt.state[params[1]]["do_wd"] = False
    for i in range(steps):
        give_gradients(params, i)
        if i < 5:
            params[2].grad = None
        if each is not None:
            each(opt, i)
        opt.step()
    return [v for p in params for v in p.detach().flatten().tolist()]


def mom_sometimes_zero(opt, i):
    opt.set_hyper("mom", 0.0 if i % 7 == 3 else 0.9)


RATES = {"lr": [0.05, 0.02]}
APART = {"lr": [0.05, 0.02], "mom": [0.9, 0.5], "wd": [0.1, 0.3]}
CASES = {
    "sgd": (lambda ps: SGD(ps, 0.1, wd=0.1), APART),
    "sgd_l2": (lambda ps: SGD(ps, 0.1, wd=0.1, decouple_wd=False), RATES),
    "sgd_mom": (lambda ps: SGD(ps, 0.1, mom=0.9, wd=0.1), APART),
    "sgd_mom_l2": (lambda ps: SGD(ps, 0.1, mom=0.9, wd=0.1, decouple_wd=False), APART),
    "sgd_mom_zero": (lambda ps: SGD(ps, 0.1, mom=0.9, wd=0.1), APART, mom_sometimes_zero),
    "sgd_never_mom": (lambda ps: SGD(ps, 0.1), RATES, lambda opt, i: opt.set_hyper("mom", 0.9)),
    "adam": (lambda ps: Adam(ps, 0.1), RATES),
    "adam_groups": (lambda ps: Adam(ps, 0.1), APART),
    "adam_l2": (lambda ps: Adam(ps, 0.1, decouple_wd=False), APART),
    "adam_eps": (lambda ps: Adam(ps, 0.1, eps=0.1, sqr_mom=0.9, wd=0.0), RATES, mom_sometimes_zero),
}

# What `trained` returns with the optimizers of fastai 2.8.12 (torch 2.13, CPU).
FASTAI = {
    "sgd": [
        0.8732853,
        0.239285,
        -0.7479513,
        -0.6123826,
        0.4643963,
        0.901189,
        0.5521358,
        -0.5966656,
        -0.8021095,
        -0.3892008,
        -0.9472069,
        -0.1622762,
        -0.8220599,
    ],
    "sgd_l2": [
        0.8732851,
        0.239285,
        -0.7479513,
        -0.6123824,
        0.4643963,
        0.901189,
        0.5521358,
        -0.5966656,
        -0.8021095,
        -0.4163594,
        -1.0064701,
        -0.1700469,
        -0.8897142,
    ],
    "sgd_mom": [
        0.430567,
        -0.2238713,
        -1.0137165,
        -0.5557627,
        0.8167717,
        1.3835927,
        -0.300181,
        -0.8878229,
        -0.3951717,
        -0.4184449,
        -0.9605227,
        -0.1534019,
        -0.6973202,
    ],
    "sgd_mom_l2": [
        0.1140901,
        -0.213855,
        -0.5696597,
        -0.2461112,
        0.5417414,
        0.8498477,
        -0.300181,
        -0.8878229,
        -0.3951717,
        -0.3803593,
        -0.8823907,
        -0.1413016,
        -0.6172348,
    ],
    "sgd_mom_zero": [
        1.2157208,
        0.7501947,
        -0.3088566,
        -0.4516157,
        0.2712238,
        0.4449297,
        1.6051399,
        0.1007428,
        -0.7882988,
        -0.4079809,
        -1.2786398,
        -0.6504838,
        -1.2738041,
    ],
    "sgd_never_mom": [
        0.9636455,
        0.2592611,
        -0.8331353,
        -0.6813595,
        0.5129458,
        0.9999772,
        0.5521358,
        -0.5966656,
        -0.8021095,
        -0.4305191,
        -1.0373788,
        -0.17411,
        -0.9255487,
    ],
    "adam": [
        0.8030125,
        0.0429071,
        -0.9953288,
        -0.7556922,
        0.5630445,
        1.2071604,
        0.3440268,
        -0.7711031,
        -0.8767924,
        -0.5024235,
        -1.0599116,
        -0.1587541,
        -0.9352866,
    ],
    "adam_groups": [
        0.7291717,
        0.0353844,
        -0.910911,
        -0.6890873,
        0.5183314,
        1.1075168,
        0.3440268,
        -0.7711031,
        -0.8767924,
        -0.4134036,
        -0.9272554,
        -0.1228545,
        -0.8506882,
    ],
    "adam_l2": [
        0.6677141,
        0.0327361,
        -0.8933872,
        -0.6683,
        0.5038967,
        1.0887594,
        0.3440268,
        -0.7711031,
        -0.8767924,
        -0.4386483,
        -0.982605,
        -0.1297914,
        -0.9273052,
    ],
    "adam_eps": [
        0.5768515,
        0.5528186,
        -0.0141855,
        0.2866793,
        1.171465,
        1.0492717,
        1.139706,
        0.3688069,
        0.1042963,
        -0.1982102,
        -0.8574255,
        -0.1421002,
        -0.756633,
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_end_where_fastai_ends(name):
    assert trained(*CASES[name]) == pytest.approx(FASTAI[name], abs=1e-6)


def test_defaults_are_those_of_fastai():
    assert dict(SGD(parameters(), 0.1).hypers[0]) == {"lr": 0.1, "mom": 0.0, "wd": 0.0}
    adam = {"lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01}
    assert dict(Adam(parameters(), 0.1).hypers[0]) == adam


def test_sgd_made_without_momentum_stays_without():
    params = parameters()
    opt = SGD(params, 0.1)
    opt.set_hyper("mom", 0.9)
    give_gradients(params, 0)
    opt.step()
    assert (opt.hypers[0]["mom"], dict(opt.state[params[0]])) == (0.9, {})


@pytest.mark.parametrize("make", [lambda ps: SGD(ps, 0.1, mom=0.9, wd=0.1), lambda ps: Adam(ps, 0.1)])
def test_frozen_parameters_take_no_step(make):
    params = parameters()
    opt = make([[p] for p in params])
    give_gradients(params, 0)
    opt.step()
    opt.freeze_to(2)
    before = copy.deepcopy(params)
    opt.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, True, False, False]
    opt.unfreeze()
    opt.step()
    assert not torch.equal(params[0], before[0])


def test_a_step_counts_for_the_parameters_that_take_it():
    params = parameters()
    opt = Adam(params, 0.1)
    for missing in (None, 2, None, 2):
        give_gradients(params, 0)
        if missing is not None:
            params[missing].grad = None
        opt.step()
    assert [opt.state[p]["step"] for p in params] == [4, 4, 2, 4]


def test_a_decay_flag_set_between_steps_is_seen():
    (p,) = params = [nn.Parameter(torch.ones(1))]
    opt = SGD(params, 1.0, wd=0.5)
    state = opt.state[p]
    seen = []
    for flag in (True, False, True):
        state["do_wd"] = flag
        p.grad = torch.zeros(1)
        opt.step()
        seen.append(p.item())
    assert seen == [0.5, 0.5, 0.25]


def test_state_set_between_steps_is_seen():
    (p,) = params = [nn.Parameter(torch.ones(1))]
    opt = SGD(params, 1.0, mom=0.5)
    p.grad = torch.zeros(1)
    opt.step()
    opt.state[p]["grad_avg"] = torch.tensor([4.0])
    opt.step()
    opt.state[p] = {"grad_avg": torch.tensor([8.0])}
    opt.step()
    assert p.item() == 1.0 - 2.0 - 4.0


def test_the_number_of_steps_set_by_hand_is_used():
    (p,) = params = [nn.Parameter(torch.zeros(1))]
    opt = Adam(params, 1.0, wd=0.0, eps=0.0)
    opt.state[p].update(step=999_999, grad_avg=torch.zeros(1), sqr_avg=torch.zeros(1))
    p.grad = torch.ones(1)
    opt.step()
    assert p.item() == pytest.approx(-0.1 / math.sqrt(0.01), rel=1e-5)
    assert opt.state[p]["step"] == 1_000_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda ps: SGD(ps, 0.1, mom=0.9, wd=0.1), lambda ps: Adam(ps, 0.1)])
def test_other_precisions_follow_the_same_path(make, dtype):
    ends = []
    for kind in (dtype, torch.float32):
        params = parameters(kind)
        opt = make(params)
        for i in range(3):
            give_gradients(params, i)
            opt.step()
        ends.append(torch.cat([p.detach().flatten().float() for p in params]))
        assert opt.state[params[0]]["grad_avg"].dtype == kind
    assert torch.allclose(*ends, atol=1e-6 if dtype == torch.float64 else 0.05)


def test_precisions_may_differ_within_a_group():
    params = [*parameters()[:1], *parameters(torch.float64)[1:]]
    opt = Adam(params, 0.1)
    give_gradients(params, 0)
    opt.step()
    assert [opt.state[p]["step"] for p in params] == [1, 1, 1, 1]


@pytest.mark.parametrize("make", [lambda ps: SGD(ps, 0.1, mom=0.9, wd=0.1), lambda ps: Adam(ps, 0.1)])
def test_complex_parameters_take_the_form_that_torch_has_for_them(make):
    p = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))
    opt = make([p, nn.Parameter(torch.ones(2))])
    for q, *_ in opt.all_params():
        q.grad = torch.ones_like(q)
    opt.step()
    assert (p.real < torch.tensor([1.0, 2.0])).all()


@pytest.mark.parametrize("wd", [0.0, 0.1])
@pytest.mark.parametrize("mom", [0.0, 0.9])
def test_sgd_takes_sparse_gradients(mom, wd):
    ends = []
    for sparse in (True, False):
        embedding = nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=sparse)
        opt = SGD(embedding.parameters(), 0.1, mom=mom, wd=wd)
        for _ in range(2):
            opt.zero_grad()
            embedding(torch.tensor([1, 1, 3])).sum().backward()
            opt.step()
        ends.append(embedding.weight.detach())
    assert torch.allclose(*ends)


def test_gradients_are_left_as_they_are():
    params = parameters()
    opt = SGD(params, 0.1, mom=0.9, wd=0.5, decouple_wd=False)
    give_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    opt.step()
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_a_step_without_any_gradient_changes_nothing():
    params = parameters()
    opt = Adam(params, 0.1)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))
    assert opt.state_dict()["state"] == [{}, {}, {}, {}]
