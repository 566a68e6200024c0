"""Parts and parameters of torch modules; expected values as fastai 2.8.12 gives unless a comment says otherwise."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from learnloop.modules import Module, ParameterModule, flatten_model, has_params, one_param, total_params


class Scaled(Module):
    def __init__(self, size, factor=1.0):
        self.linear, self.factor = nn.Linear(size, 1), factor

    def forward(self, x):
        return self.factor * self.linear(x)


class OldStyle(Module):
    def __init__(self):
        self.before = nn.Linear(1, 1)
        super().__init__()
        self.after = nn.Linear(1, 1)


class Gated(nn.Module):
    """A container with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))
        self.body = nn.Sequential(nn.Linear(2, 3), nn.ReLU())


def test_a_module_needs_no_call_of_the_constructor_above():
    model = Scaled(2, factor=3.0)
    assert [name for name, _ in model.named_parameters()] == ["linear.weight", "linear.bias"]
    assert torch.equal(model(torch.ones(1, 2)), 3 * model.linear(torch.ones(1, 2)))


def test_a_call_of_the_constructor_above_forgets_nothing():
    assert [name for name, _ in OldStyle().named_children()] == ["before", "after"]


def test_a_module_can_be_copied_and_pickled():
    model = Scaled(2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.linear.weight, model.linear.weight)
        assert other.linear.weight is not model.linear.weight


def test_a_module_shows_the_signature_of_its_constructor():
    assert str(inspect.signature(Scaled)) == "(size, factor=1.0)"


def test_a_module_can_have_an_abstract_base():  # fastai: metaclass conflict
    from abc import ABC, abstractmethod

    class Shape(Module, ABC):
        @abstractmethod
        def area(self): ...

    with pytest.raises(TypeError, match="abstract"):
        Shape()


def test_a_flat_model_is_the_modules_without_children_in_order():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm1d(3))), nn.Linear(3, 1))
    assert flatten_model(model) == [model[0], model[1][0], model[1][1][0], model[2]]


def test_a_flat_model_without_children_is_itself():
    model = nn.Linear(2, 1)
    assert flatten_model(model) == [model]


def test_a_containers_own_parameter_follows_its_parts():
    model = Gated()
    linear, relu, own = flatten_model(model)
    assert (linear, relu) == tuple(model.body)
    assert type(own) is ParameterModule and own.val is model.gate
    assert own(5) == 5


def test_a_module_used_twice_is_in_the_flat_model_once():  # fastai: once per container
    act = nn.ReLU()
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), act), nn.Sequential(nn.Linear(2, 2), act))
    assert flatten_model(model) == [model[0][0], act, model[1][0]]


def test_a_parameter_of_a_part_is_not_the_containers_own():
    model = Gated()
    model.tied = model.body[0].weight
    assert [type(m).__name__ for m in flatten_model(model)] == ["Linear", "ReLU", "ParameterModule"]


def test_one_param_is_the_first():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1))
    assert one_param(model) is model[1].weight
    assert one_param(nn.ReLU()) is None


def test_has_params_looks_into_the_parts():
    assert has_params(nn.Sequential(nn.ReLU(), nn.Linear(2, 1)))
    assert not has_params(nn.Sequential(nn.ReLU()))


def test_total_params_counts_numbers():
    assert total_params(nn.Linear(2, 3)) == (9, True)
    assert total_params(nn.ReLU()) == (0, False)
    assert total_params(nn.Linear(2, 3).requires_grad_(False)) == (9, False)


def test_a_part_that_is_trained_makes_the_total_trained():  # fastai asks the first parameter only
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    assert total_params(model) == (13, True)
