"""What every optimizer shows: groups, hypers, state, freezing, saving; and torch's optimizers behind the same face."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from torch import nn

from learnloop.optim.algorithms import SGD, Adam
from learnloop.optim.optimizer import Optimizer
from learnloop.optim.wrapper import OptimWrapper


def tensors(*shapes):
    return [nn.Parameter(torch.linspace(-1, 1, math.prod(s)).reshape(s)) for s in shapes or [(2, 3), (3,), (3, 1)]]


def give_gradients(opt, i=0):
    for j, (p, *_) in enumerate(opt.all_params()):
        p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) * 0.7 + i + j).reshape(p.shape)


def stepped(opt, times=3):
    for i in range(times):
        give_gradients(opt, i)
        opt.step()
    return opt


def values(opt):
    return [p.detach().flatten().tolist() for p, *_ in opt.all_params()]


TorchAdamW = partial(OptimWrapper, opt=torch.optim.AdamW)
every_kind = pytest.mark.parametrize(
    "make", [partial(SGD, mom=0.9), Adam, TorchAdamW], ids=["SGD", "Adam", "OptimWrapper"]
)


def sgd_of(n_groups):
    return SGD([[p] for p in tensors(*[(2,)] * n_groups)], lr=0.1)


# groups


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (lambda ps: ps, [3]),
        (lambda ps: (p for p in ps), [3]),
        (lambda ps: [ps[:2], ps[2:]], [2, 1]),
        (lambda ps: L(L(ps[:1]), L(ps[1:])), [1, 2]),
        (lambda ps: [iter(ps[:1]), iter(ps[1:])], [1, 2]),
        (lambda ps: [ps, []], [3, 0]),
        (lambda ps: ps[0], [1]),
    ],
    ids=["list", "generator", "lists", "L", "generators", "an empty group", "one tensor"],
)
@every_kind
def test_parameters_may_come_in_one_group_or_several(make, given, sizes):
    assert [len(group) for group in make(given(tensors()), lr=0.1).param_lists] == sizes


@every_kind
@pytest.mark.parametrize("nothing", [[], [[]], iter(())], ids=["empty", "empty group", "spent generator"])
def test_no_parameters_are_refused(make, nothing):
    with pytest.raises(ValueError, match="at least one parameter"):
        make(nothing, lr=0.1)


@every_kind
def test_a_parameter_in_two_groups_is_refused(make):
    a, b, _ = tensors()
    with pytest.raises(ValueError, match=r"shape \(2, 3\) is in group 0 and again in group 1"):
        make([[a, b], [a]], lr=0.1)


@every_kind
@pytest.mark.parametrize("wrong", [[nn.Linear(2, 2)], [("weight", 0.5)], nn.Linear(2, 2)])
def test_what_is_no_parameter_is_refused(make, wrong):
    with pytest.raises(TypeError, match="parameter"):
        make(wrong, lr=0.1)


@every_kind
def test_an_unknown_argument_is_refused(make):
    with pytest.raises(TypeError, match="learning_rate"):
        make(tensors(), lr=0.1, learning_rate=0.1)


# hypers


@pytest.mark.parametrize(
    ("value", "rates"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        ([0.5], [0.5, 0.5, 0.5]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        (np.array([0.1, 0.2, 0.3]), [0.1, 0.2, 0.3]),
        (slice(0.5), [0.05, 0.05, 0.5]),
        (slice(1e-3, 1e-1), [1e-3, 1e-2, 1e-1]),
        (torch.tensor(0.5), [0.5, 0.5, 0.5]),
    ],
    ids=repr,
)
@every_kind
def test_a_hyper_is_set_for_all_groups_or_for_each(make, value, rates):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.set_hyper("lr", value)
    assert [h["lr"] for h in opt.hypers] == pytest.approx(rates)
    assert {type(h["lr"]) for h in opt.hypers} == {float}


def test_rates_given_to_the_constructor_may_differ_by_group():
    assert [h["lr"] for h in SGD([[p] for p in tensors()], lr=slice(0.1)).hypers] == pytest.approx([0.01, 0.01, 0.1])


@every_kind
def test_a_new_name_creates_a_hyper(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.set_hyper("shrink", [1, 2, 3])
    assert [h["shrink"] for h in opt.hypers] == [1, 2, 3]


@every_kind
def test_a_wrong_number_of_values_changes_nothing(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    with pytest.raises(ValueError, match="`lr` got 2 values, but there are 3 parameter groups"):
        opt.set_hypers(wd=0.5, lr=[0.1, 0.2])
    assert [(h["lr"], h["wd"]) for h in opt.hypers] == [(0.1, make(tensors(), lr=0.1).hypers[0]["wd"])] * 3


def test_an_empty_slice_is_refused():
    with pytest.raises(ValueError, match="use slice"):
        sgd_of(2).set_hyper("lr", slice(None))


@every_kind
def test_param_groups_show_parameters_and_hypers(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    group = opt.param_groups[1]
    assert isinstance(group, dict)
    assert group["params"][0] is opt.param_lists[1][0]
    assert group["lr"] == 0.1


@every_kind
def test_what_is_written_into_param_groups_is_set(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.param_groups[1]["lr"] = 0.7
    opt.param_groups[2].update(wd=0.3)
    assert [h["lr"] for h in opt.hypers] == [0.1, 0.7, 0.1]
    assert opt.hypers[2]["wd"] == 0.3


@every_kind
def test_setting_param_groups_sets_parameters_too(make):
    opt = stepped(make([[p] for p in tensors()], lr=0.1))
    new = tensors()
    opt.param_groups = [{"params": [p], "lr": 0.5} for p in new]
    before = [p.detach().clone() for p in new]
    stepped(opt, 1)
    assert opt.hypers[0]["lr"] == 0.5
    assert not any(torch.equal(p, q) for p, q in zip(new, before, strict=True))


# state


def test_state_is_made_on_access():
    opt = sgd_of(1)
    assert opt.state[opt.param_lists[0][0]] == {}


def test_adam_keeps_its_averages_and_a_whole_number_of_steps():
    opt = stepped(Adam(tensors(), lr=0.1), 3)
    state = opt.state[opt.param_lists[0][0]]
    assert set(state) == {"grad_avg", "sqr_avg", "step"}
    assert (type(state["step"]), state["step"]) == (int, 3)
    assert state["grad_avg"].shape == state["sqr_avg"].shape == (2, 3)


@every_kind
def test_clear_state_keeps_the_flags(make):
    opt = make(tensors(), lr=0.1)
    fresh = values(stepped(make(tensors(), lr=0.1), 1))
    p = opt.param_lists[0][0]
    opt.state[p].update(do_wd=True, force_train=True)
    stepped(opt)
    opt.clear_state()
    assert opt.state[p] == {"do_wd": True, "force_train": True}
    for (q, *_), start in zip(opt.all_params(), tensors(), strict=True):
        q.data.copy_(start.data)
    assert values(stepped(opt, 1)) == fresh


@every_kind
def test_zero_grad_sets_gradients_to_none(make):
    opt = stepped(make([[p] for p in tensors()], lr=0.1))
    opt.zero_grad()
    assert [p.grad for p, *_ in opt.all_params()] == [None, None, None]


@every_kind
def test_all_params_gives_groups_by_number_or_slice(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    b = opt.param_lists[1][0]
    b.grad = torch.zeros_like(b)
    found = [opt.all_params(), opt.all_params(-1), opt.all_params(slice(0, 2)), opt.all_params(with_grad=True)]
    shapes = [[tuple(p.shape) for p, *_ in params] for params in found]
    assert shapes == [[(2, 3), (3,), (3, 1)], [(3, 1)], [(2, 3), (3,)], [(3,)]]
    _, group, state, hyper = opt.all_params(1)[0]
    assert (group[0] is b, state is opt.state[b], hyper["lr"]) == (True, True, 0.1)


# freezing


def trained(opt):
    return [p.requires_grad for p, *_ in opt.all_params()]


@every_kind
@pytest.mark.parametrize(("n", "idx"), [(1, 1), (-1, 2), (0, 0), (-3, 0)])
def test_freeze_to_freezes_the_groups_before(make, n, idx):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.freeze_to(n)
    assert (opt.frozen_idx, trained(opt)) == (idx, [i >= idx for i in range(3)])


@every_kind
def test_freeze_keeps_the_last_group_and_unfreeze_ends_it(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.freeze()
    assert trained(opt) == [False, False, True]
    opt.unfreeze()
    assert trained(opt) == [True, True, True]


@every_kind
def test_force_train_wins_over_freezing(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.state[opt.param_lists[0][0]]["force_train"] = True
    opt.freeze()
    assert trained(opt) == [True, False, True]
    opt.set_freeze(0, False, ignore_force_train=True)
    assert trained(opt) == [False, False, True]


def test_freezing_everything_warns():
    with pytest.warns(UserWarning, match="freezes all of the 2 parameter groups"):
        sgd_of(2).freeze_to(2)


def test_freezing_beyond_the_first_group_is_refused():
    with pytest.raises(ValueError, match=r"freeze_to\(-3\)"):
        sgd_of(2).freeze_to(-3)


def test_freezing_a_single_group_is_refused():
    with pytest.raises(ValueError, match="splitter"):
        sgd_of(1).freeze()


# saving


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
def test_a_loaded_state_goes_on_bit_for_bit(make):
    opt = make([[p] for p in tensors()], lr=0.1)
    opt.set_hypers(lr=np.array([0.1, 0.2, 0.3]), extra=np.float64(1.0))
    opt.state[opt.param_lists[1][0]]["do_wd"] = False
    stepped(opt)
    other = make([[p.detach().clone().requires_grad_() for p in group] for group in opt.param_lists], lr=9.0)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert [dict(h) for h in other.hypers] == [dict(h) for h in opt.hypers]
    assert values(stepped(other)) == values(stepped(opt))


@every_kind
def test_state_dict_lists_parameters_and_groups_in_order(make):
    opt = stepped(make([[p] for p in tensors()], lr=slice(1e-3, 1e-1) if make is not TorchAdamW else 0.1))
    sd = opt.state_dict()
    assert set(sd) - {"decay_asked"} == {"state", "hypers", "shapes"}
    assert (len(sd["state"]), len(sd["hypers"])) == (3, 3)
    assert {type(h) for h in sd["hypers"]} == {dict}


@every_kind
def test_loading_shares_nothing_with_the_given_state(make):
    opt = stepped(make(tensors(), lr=0.1))
    sd = copy.deepcopy(opt.state_dict())
    other = make(tensors(), lr=0.1)
    other.load_state_dict(sd)
    stepped(other)
    other.set_hyper("lr", 5.0)
    assert sd["hypers"][0]["lr"] == 0.1
    for mine, saved in zip(opt.state_dict()["state"], sd["state"], strict=True):
        assert all(torch.equal(mine[k], v) if isinstance(v, torch.Tensor) else mine[k] == v for k, v in saved.items())


@every_kind
def test_loading_into_a_used_optimizer_forgets_its_own_state(make):
    unused = make(tensors(), lr=0.1).state_dict()
    opt = stepped(make(tensors(), lr=0.1))
    opt.load_state_dict(unused)
    for (p, *_), start in zip(opt.all_params(), tensors(), strict=True):
        p.data.copy_(start.data)
    assert values(stepped(opt)) == values(stepped(make(tensors(), lr=0.1)))


@every_kind
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([tensors()], "has 1 parameter groups, this optimizer 2"),
        ([tensors()[:1], tensors()[1:2]], "has 2 parameters in groups of 1, 1, this optimizer 3 in groups of 2, 1"),
        (
            [tensors((2, 3), (4,)), tensors((3, 1))],
            r"`value` of parameter 1 in group 0 has shape \(4,\), the parameter \(3,\)",
        ),
    ],
    ids=["groups", "parameters", "shape"],
)
def test_a_state_of_another_model_is_refused_before_anything_changes(make, groups, message):
    opt = stepped(make([tensors()[:2], tensors()[2:]], lr=0.1))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(stepped(make([[*group] for group in groups], lr=7.0)).state_dict())
    assert str(opt.state_dict()) == str(before)


def test_a_state_of_another_kind_of_optimizer_is_refused():
    with pytest.raises(ValueError, match="no sqr_mom, eps, which Adam needs"):
        Adam(tensors(), lr=0.1).load_state_dict(SGD(tensors(), lr=0.1).state_dict())


def test_a_dict_that_is_no_optimizer_state_is_refused():
    with pytest.raises(ValueError, match="this one has state, param_groups"):
        SGD(tensors(), lr=0.1).load_state_dict(torch.optim.SGD(tensors(), lr=0.1).state_dict())


@every_kind
@pytest.mark.parametrize("again", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_a_copy_goes_on_alike_and_apart(make, again):
    opt = stepped(make([[p] for p in tensors()], lr=0.1))
    other = again(opt)
    assert values(stepped(other)) == values(stepped(opt))
    other.hypers[0]["lr"] = 3.0
    assert opt.hypers[0]["lr"] == 0.1
    assert values(stepped(other, 1)) != values(stepped(opt, 1))


def test_repr_shows_the_groups():
    opt = SGD([tensors((20, 100), (5,)), tensors((3,))], lr=slice(0.1), wd=0.01)
    opt.freeze()
    assert repr(opt) == (
        "SGD, 2 parameter groups\n"
        "  0: 2 tensors with 2,005 values, lr=0.01, mom=0, wd=0.01, frozen\n"
        "  1: 1 tensor with 3 values, lr=0.1, mom=0, wd=0.01"
    )


# steps by small functions


def count_step(p, step=0, **kwargs):
    return {"step": step + 1}


def shrink_step(p, shrink, step, **kwargs):
    p.mul_(shrink**step)
    return p


shrink_step.defaults = {"shrink": 0.5}


def test_steppers_get_state_and_hypers_and_may_update_state():
    opt = Optimizer(nn.Parameter(torch.tensor([8.0])), [count_step, shrink_step], lr=0.1)
    stepped(opt, 2)
    assert (values(opt), opt.hypers[0]) == ([[1.0]], {"shrink": 0.5, "lr": 0.1})


def test_a_partial_of_a_stepper_keeps_its_defaults():
    assert Optimizer(tensors(), partial(shrink_step, step=1)).hypers[0] == {"shrink": 0.5}


def test_given_hypers_win_over_those_of_steppers():
    assert Optimizer(tensors(), shrink_step, shrink=0.9).hypers[0] == {"shrink": 0.9}


def test_steppers_leave_frozen_parameters_alone():
    opt = Optimizer([[p] for p in tensors((1,), (1,))], [count_step], lr=0.1)
    give_gradients(opt)
    opt.freeze()
    opt.step()
    assert [s for s in opt.state_dict()["state"]] == [{}, {"step": 1}]


@pytest.mark.parametrize("make", [SGD, Adam, partial(Optimizer, cbs=[count_step])])
def test_a_closure_is_refused_where_it_would_not_be_called(make):
    with pytest.raises(NotImplementedError, match="closure"):
        make(tensors(), lr=0.1).step(lambda: 0.0)


def test_in_a_cell_its_groups_are_a_table():
    opt = Adam([[torch.ones(2, 3)], [torch.ones(1)]], lr=0.1)
    opt.freeze()
    shown = opt._repr_html_()
    assert "<th>lr</th>" in shown
    assert "<td>0</td><td></td><td>1</td><td>6</td><td>0.1</td>" in shown
    assert shown.count("<td>frozen</td>") == 1
