"""The algorithms: the numbers of fastai, who takes a step, and which forms of torch do the work.

fastai_steps.json is written by make_fastai_steps.py.
"""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from learnloop.optim import algorithms
from learnloop.optim.algorithms import SGD, Adam, Lamb, Larc, Lion, QHAdam, RAdam, RMSProp, ranger
from learnloop.optim.optimizer import Optimizer
from tests.optim.steps import CASES, case, give_gradients, parameters

FASTAI = json.loads(Path(__file__).with_name("fastai_steps.json").read_text())["ends"]
FUSED = [name for name, (algorithm, *_) in CASES.items() if algorithm in ("SGD", "Adam")]


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_end_where_fastai_ends(name):
    assert case(name, algorithms) == pytest.approx(FASTAI[name], abs=1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_the_form_made_of_steppers_ends_there_too(name):
    assert case(name, algorithms, fused=False) == pytest.approx(FASTAI[name], abs=1e-6)


@pytest.mark.parametrize("make", [SGD, RMSProp, Adam, RAdam, QHAdam, Larc, Lamb, Lion, ranger])
def test_every_algorithm_is_an_optimizer(make):
    assert isinstance(make(parameters(), 0.1), Optimizer)


@pytest.mark.parametrize(
    ("make", "hypers"),
    [
        (SGD, {"lr": 0.1, "mom": 0.0, "wd": 0.0}),
        (RMSProp, {"lr": 0.1, "mom": 0.0, "sqr_mom": 0.99, "eps": 1e-8, "wd": 0.0}),
        (Adam, {"lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01}),
        (RAdam, {"lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.0, "beta": 0.0}),
        (QHAdam, {"lr": 0.1, "nu_1": 0.7, "nu_2": 1.0, "mom": 0.999, "sqr_mom": 0.999, "eps": 1e-8, "wd": 0.0}),
        (Larc, {"lr": 0.1, "mom": 0.9, "trust_coeff": 0.02, "eps": 1e-8, "wd": 0.0}),
        (Lamb, {"lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.0}),
        (ranger, {"lr": 0.1, "mom": 0.95, "sqr_mom": 0.99, "eps": 1e-6, "wd": 0.01, "beta": 0.0}),
    ],
)
def test_defaults_are_those_of_fastai(make, hypers):
    assert make(parameters(), 0.1).hypers[0] == hypers


def test_rmsprop_is_torchs():
    ends = []
    for make in (RMSProp, partial(torch.optim.RMSprop, alpha=0.99)):
        params = parameters()
        opt = make(params, 0.1)
        for i in range(5):
            give_gradients(params, i)
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.allclose(*ends, atol=1e-6)


def test_lion_goes_by_the_sign_of_a_mix_and_keeps_an_average():
    (p,) = params = [nn.Parameter(torch.tensor([1.0, -2.0]))]
    opt = Lion(params, 0.1, mom=0.5, avg_mom=0.75, wd=0.2)
    seen = []
    for grad in ([1.0, -1.0], [-0.2, 4.0]):
        p.grad = torch.tensor(grad)
        opt.step()
        seen.append((p.tolist(), opt.state[p]["grad_avg"].tolist()))
    # By hand. The second mixes are 0.5 * 0.25 - 0.5 * 0.2 and -0.5 * 0.25 + 0.5 * 4: both above 0.
    assert seen[0] == (pytest.approx([0.98 - 0.1, -1.96 + 0.1]), pytest.approx([0.25, -0.25]))
    assert seen[1][0] == pytest.approx([0.88 * 0.98 - 0.1, -1.86 * 0.98 - 0.1])
    assert seen[1][1] == pytest.approx([0.25 * 0.75 - 0.25 * 0.2, -0.25 * 0.75 + 0.25 * 4.0])


def test_larc_and_lamb_leave_zeros_that_have_no_gradient_where_they_are():
    for make in (Larc, Lamb):
        p = nn.Parameter(torch.zeros(2))
        p.grad = torch.zeros(2)
        make([p], 0.1).step()
        assert p.tolist() == [0.0, 0.0]


def test_a_group_with_momentum_of_its_own_gets_a_sum_of_gradients():
    a, b = parameters()[:2]
    opt = SGD([[a], [b]], 0.1, mom=[0.0, 0.9])
    give_gradients([a, b], 0)
    opt.step()
    assert [set(opt.state[p]) for p in (a, b)] == [{"grad_avg"}, {"grad_avg"}]


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
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True] * 2 + [False] * 4
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
    assert [opt.state[p]["step"] for p in params] == [4, 4, 2, 4, 4, 4]


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
    assert [opt.state[p]["step"] for p in params] == [1] * 6


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
    assert opt.state_dict()["state"] == [{}] * 6
