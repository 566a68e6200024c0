"""Values of hypers: what is refused, and that a refusal changes nothing."""

import math

import pytest
import torch
from torch import nn

from learnloop import SGD, Adam, OptimWrapper, by_name
from learnloop.optim.hypers import spread


def two_groups(make=Adam, **kwargs):
    return make([[nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(3))]], lr=0.1, **kwargs)


def wrapped(params, **kwargs):
    return OptimWrapper(params, opt=torch.optim.AdamW, **kwargs)


@pytest.mark.parametrize("make", [Adam, wrapped])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -0.1, "`lr=-0.1`: pass a finite number from 0 on"),
        ("lr", math.nan, "`lr=nan`"),
        ("lr", math.inf, "`lr=inf`"),
        ("lr", [0.1, -1.0], "`lr=-1.0`"),
        ("mom", 1.0, "`mom=1.0`: pass a finite number from 0 on and below 1"),
        ("sqr_mom", -0.5, "`sqr_mom=-0.5`"),
        ("wd", -1e-3, "`wd=-0.001`"),
        ("eps", -1.0, "`eps=-1.0`"),
        ("lr", [0.1, 0.2, 0.3], "`lr` got 3 values, but there are 2 parameter groups; pass one value or 2"),
        ("lr", slice(None), "use slice"),
        ("lr", slice(0.1, 1.0, 2), "use slice"),
        ("lr", slice(-0.1, 0.1), "no factor leads"),
    ],
)
def test_a_value_that_cannot_be_is_refused_and_changes_nothing(make, name, value, message):
    opt = two_groups(make)
    before = repr(opt)
    with pytest.raises(ValueError, match=message):
        opt.set_hypers(**{"wd": 0.5, name: value} if name != "wd" else {"lr": 0.5, name: value})
    assert repr(opt) == before


@pytest.mark.parametrize("value", ["0.1", None, True, [None, 0.1], {"a": 1}, nn.Linear(1, 1)])
def test_what_is_no_number_is_refused(value):
    opt = two_groups()
    with pytest.raises(TypeError, match=r"`lr=.*pass a number"):
        opt.set_hyper("lr", value)
    assert [h["lr"] for h in opt.hypers] == [0.1, 0.1]


def test_a_hyper_of_a_users_own_may_be_anything():
    opt = two_groups()
    opt.set_hyper("mode", "fast")
    assert [h["mode"] for h in opt.hypers] == ["fast", "fast"]


def test_a_wrong_value_in_param_groups_changes_nothing():
    opt = two_groups()
    before = repr(opt)
    with pytest.raises(ValueError, match="`lr=-1`"):
        opt.param_groups = [{"lr": 0.3}, {"lr": -1}]
    assert repr(opt) == before


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": 0.1, "mom": "much"}])
def test_a_wrong_value_in_the_constructor_is_refused(wrong):
    with pytest.raises((ValueError, TypeError), match="pass a"):
        SGD([nn.Parameter(torch.ones(2))], **wrong)


def test_slices_follow_the_rules_of_fastai():
    assert spread("lr", slice(1.0), 3) == [0.1, 0.1, 1.0]
    assert spread("lr", slice(0, 1.0), 3) == [0.1, 0.1, 1.0]  # a start of 0 is none, as there
    assert spread("lr", slice(0.01, 1.0), 3) == pytest.approx([0.01, 0.1, 1.0])
    assert spread("lr", slice(0.01, 1.0), 1) == [1.0]


def test_groups_may_have_hypers_of_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    opt = Adam(by_name({"0.*": {"lr": 1e-4, "wd": 0.0}, "1.*": {}})(model), lr=0.1)
    assert [(h["lr"], h["wd"]) for h in opt.hypers] == [(1e-4, 0.0), (0.1, 0.01)]
    assert opt.or_own("lr", 0.5) == [1e-4, 0.5]


@pytest.mark.parametrize("make", [Adam, wrapped])
def test_an_unknown_hyper_of_a_group_is_refused(make):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with pytest.raises(TypeError, match="`rate`"):
        make(by_name({"0.*": {"rate": 1e-4}, "1.*": {}})(model), lr=0.1)
