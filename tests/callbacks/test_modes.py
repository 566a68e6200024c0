"""TrainEvalCallback: where the model lies and in which mode it is."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import toy_learner


class Modes(ll.Callback):
    """Notes the phase and the model's mode in each batch."""

    def __init__(self):
        self.seen = []

    def before_batch(self):
        self.seen.append((self.learn.training, self.model.training))


class Resets(nn.Linear):
    """A model with a state that begins anew with each fit."""

    n_resets = 0

    def reset(self):
        self.n_resets += 1


def test_the_model_trains_in_train_mode_and_is_validated_in_eval_mode():
    modes = Modes()
    learn = toy_learner(n_train=16, n_valid=8, cbs=modes)
    learn.fit(2)
    assert modes.seen == [(True, True), (True, True), (False, False)] * 2


def test_the_model_is_in_eval_mode_after_a_fit():
    learn = toy_learner()
    learn.fit(1)
    assert not any(module.training for module in learn.model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_validate_leaves_each_module_in_the_mode_in_which_it_was(training):
    learn = toy_learner()
    learn.model.train(training)
    learn.model[0].training = not training

    learn.validate()

    assert [m.training for m in learn.model.modules()] == [training, not training, training, training]


def test_without_the_callback_nobody_sets_the_mode():
    modes = Modes()
    learn = toy_learner(n_train=8, n_valid=8, default_cbs=False, cbs=modes)
    learn.model.eval()
    learn.fit(1)
    assert modes.seen == [(True, False), (False, False)]


def test_a_model_with_a_reset_method_is_reset_when_a_fit_begins():
    learn = toy_learner(model=Resets(2, 1))
    learn.fit(2)
    learn.fit(1)
    assert learn.model.n_resets == 2


def test_a_model_whose_reset_is_no_method_is_left_alone():
    model = nn.Linear(2, 1)
    model.reset = "gate"
    toy_learner(model=model).fit(1)


def test_a_model_that_is_a_plain_function_has_no_mode():
    learn = toy_learner(model=lambda x: x.sum(1, keepdim=True))
    learn.fit(1)
    assert learn.validate()[0] > 0


def test_model_and_loss_go_to_the_device_of_the_data():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(1))

        def forward(self, pred, y):
            return ((pred - y) ** 2 * self.weight).mean()

    learn = toy_learner(loss_func=Weighted())
    learn.dls.to("meta")
    with pytest.raises(NotImplementedError):  # numbers cannot be read on this device: far enough
        learn.fit(1)
    assert {p.device.type for p in learn.model.parameters()} == {"meta"}
    assert learn.loss_func.weight.device.type == "meta"


def test_the_mode_is_set_before_callbacks_of_order_zero_hear_of_the_phase():
    seen = []
    learn = toy_learner(cbs=ll.Callback(before_validate=lambda cb: seen.append(cb.model.training)))
    learn.fit(1)
    assert seen == [False]
