"""Lookahead: slow weights over any optimizer. That it is fastai's is seen in test_algorithms, as `ranger`."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import SGD, Lookahead, OptimWrapper
from learnloop.testing import toy_learner


def param():
    return nn.Parameter(torch.zeros(1))


def stepped(opt, times):
    seen = []
    for _ in range(times):
        for p, *_ in opt.all_params():
            p.grad = torch.full_like(p, -1.0) if p.requires_grad else None
        opt.step()
        seen.append([p.item() for p, *_ in opt.all_params()])
    return seen


every_kind = pytest.mark.parametrize("make", [SGD, partial(OptimWrapper, opt=torch.optim.SGD)])


@every_kind
def test_after_k_steps_it_goes_back_by_its_share(make):
    assert stepped(Lookahead(make([param()], lr=1.0), k=2, alpha=0.25), 4) == [[1.0], [0.5], [1.5], [1.0]]


@every_kind
def test_it_shows_what_the_optimizer_inside_has(make):
    inner = make([[param()], [param()]], lr=1.0)
    opt = Lookahead(inner)
    opt.set_hyper("lr", slice(0.5))
    assert [h["lr"] for h in inner.hypers] == [0.05, 0.5]
    opt.freeze()
    assert (opt.frozen_idx, inner.frozen_idx) == (1, 1)
    assert [p.requires_grad for p, *_ in opt.all_params()] == [False, True]
    opt.zero_grad()
    assert repr(opt).startswith("Lookahead(k=6, alpha=0.5) of ")
    assert isinstance(opt, ll.Optimizer)


def test_frozen_parameters_stay_where_they_are():
    opt = Lookahead(SGD([[param()], [param()]], lr=1.0), k=2)
    stepped(opt, 1)
    opt.freeze()
    assert stepped(opt, 1) == [[1.0, 1.0]]


@every_kind
def test_a_loaded_state_goes_on_and_the_given_dict_is_left_as_it_was(make):
    opt = Lookahead(make([param()], lr=1.0), k=3)
    stepped(opt, 4)
    sd = copy.deepcopy(opt.state_dict())
    other = Lookahead(make([nn.Parameter(opt.param_lists[0][0].detach().clone())], lr=9.0), k=3)
    other.load_state_dict(sd)
    assert {"count", "slow_weights", "state", "hypers"} <= set(sd)
    assert stepped(other, 3) == stepped(opt, 3)
    assert sd["count"] == 4


def test_a_state_without_slow_weights_is_refused():
    with pytest.raises(ValueError, match="it is not one of Lookahead"):
        Lookahead(SGD([param()], lr=1.0)).load_state_dict(SGD([param()], lr=1.0).state_dict())


def test_clear_state_begins_anew():
    opt = Lookahead(SGD([param()], lr=1.0), k=2)
    stepped(opt, 1)
    opt.clear_state()
    assert (opt.count, stepped(opt, 2)) == (0, [[2.0], [2.0]])


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"k": 0}, "`k=0`"), ({"k": 1.5}, "`k=1.5`"), ({"alpha": 2.0}, "`alpha=2.0`")]
)
def test_wrong_numbers_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(SGD([param()], lr=1.0), **kwargs)


def test_an_optimizer_of_torch_is_to_be_wrapped_first():
    with pytest.raises(TypeError, match="wrap it first"):
        Lookahead(torch.optim.SGD([param()], lr=1.0))


def test_a_learner_trains_with_it():
    learn = toy_learner(opt_func=ll.ranger)
    learn.fit_one_cycle(1)
    assert learn.opt.count == learn.opt_iter
    assert learn.recorder.lrs[-1] == pytest.approx(learn.opt.hypers[-1]["lr"])
