"""BnFreeze and FreezeUntil: numbers are compared with layers that are trained by hand or not at all."""

import copy
import signal

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def split(model):
    return [list(model[:2].parameters()), list(model[2:4].parameters()), list(model[4].parameters())]


def learner(*cbs, **kwargs):
    return toy_learner(model=network(), splitter=split, cbs=cbs, **kwargs)


def means(model):
    return [model[i].running_mean.tolist() for i in (1, 3)]


def frozen(model, *layers):
    for i in layers:
        for p in model[i].parameters():
            p.requires_grad_(False)
    return model


# set_bn_eval


def test_only_batch_norm_whose_parameters_are_all_frozen_is_set():
    model = frozen(network(), 1)
    model[3].weight.requires_grad_(False)  # its bias is trained
    ll.set_bn_eval(model)
    assert [m.training for m in model] == [True, False, True, True, True]
    ll.set_bn_eval(model, use_eval=False)
    assert all(m.training for m in model)


def test_batch_norm_without_parameters_and_models_that_are_one_are_no_error():
    plain, own = nn.BatchNorm2d(3, affine=False), frozen(nn.ModuleList([nn.BatchNorm1d(2)]), 0)[0]
    for layer in (plain, own):
        ll.set_bn_eval(layer)
    assert (plain.training, own.training) == (True, False)


def test_bn_types_are_those_of_torch():
    assert ll.bn_types == (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# BnFreeze


def test_running_statistics_of_frozen_layers_stay_and_those_of_others_move():
    learn = learner(ll.BnFreeze(), train_bn=False)
    before = copy.deepcopy(means(learn.model))
    learn.freeze_to(1)
    learn.fit(2)
    assert means(learn.model)[0] == before[0]
    assert means(learn.model)[1] != before[1]


def test_a_frozen_layer_trains_in_eval_mode():
    seen = []
    note = ll.Callback(before_batch=lambda cb: seen.append((cb.training, [m.training for m in cb.model])))
    learn = learner(ll.BnFreeze(), note, n_train=8, n_valid=8, train_bn=False)
    learn.freeze_to(1)
    learn.fit(1)
    assert seen == [(True, [True, False, True, True, True]), (False, [False] * 5)]


def test_batch_norm_that_a_learner_keeps_trained_is_let_be():
    learn = learner(ll.BnFreeze())
    learn.freeze()
    before = means(learn.model)
    learn.fit(1)
    assert [now != then for now, then in zip(means(learn.model), before, strict=True)] == [True, True]


def test_taken_off_in_a_training_phase_it_puts_the_modes_back():
    seen = []

    def take_off(cb):
        cb.learn.remove_cb(ll.BnFreeze)
        seen.append([m.training for m in cb.model])

    learn = learner(ll.BnFreeze(), ll.Callback(after_loss=take_off), train_bn=False)
    learn.freeze_to(1)
    learn.fit(1)
    assert seen[0] == [True] * 5


# FreezeUntil


def moved(n_epoch, *cbs, **kwargs):
    """Which of the three linear layers have moved after each epoch."""
    rows = []
    learn = learner(*cbs, **kwargs)
    layers = [learn.model[i] for i in (0, 2, 4)]
    former = [layer.weight.clone() for layer in layers]

    def note(cb):
        rows.append([not torch.equal(layer.weight, w) for layer, w in zip(layers, former, strict=True)])
        former[:] = [layer.weight.clone() for layer in layers]

    learn.add_cb(ll.Callback(after_epoch=note))
    learn.fit(n_epoch)
    return rows


def test_all_groups_but_the_last_wait_for_their_epoch():
    assert moved(3, ll.FreezeUntil(2)) == [[False, False, True]] * 2 + [[True] * 3]


@pytest.mark.parametrize(
    ("groups", "first"), [(0, [False, True, True]), (slice(1, 3), [True, False, False]), (-1, [True, True, False])]
)
def test_the_groups_that_wait_can_be_chosen(groups, first):
    assert moved(2, ll.FreezeUntil(1, groups)) == [first, [True] * 3]


def test_several_unfreeze_one_group_after_the_other():
    assert moved(3, ll.FreezeUntil(2, 0), ll.FreezeUntil(1, 1)) == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("epochs", [(1, 2), (2, 1)])
def test_a_group_that_two_freeze_waits_for_the_last_of_them(epochs):
    assert moved(3, *map(ll.FreezeUntil, epochs)) == [[False, False, True]] * 2 + [[True] * 3]


@pytest.mark.parametrize("n_epoch", [1, 2, 3])
def test_two_of_one_group_put_back_what_was_trained_before(n_epoch):
    learn = learner(ll.FreezeUntil(1), ll.FreezeUntil(2))
    frozen = learn.model[0].bias.requires_grad_(False)
    learn.fit(n_epoch)
    assert [p is not frozen for p in learn.model.parameters()] == [p.requires_grad for p in learn.model.parameters()]


def test_epochs_that_are_not_run_count():
    rows = []
    learn = learner(ll.FreezeUntil(1))
    learn.add_cb(ll.Callback(before_train=lambda cb: rows.append(cb.model[0].weight.requires_grad)))
    learn.fit(3, start_epoch=1)
    assert rows == [True, True]


def test_what_the_learner_always_trains_is_trained():
    learn = learner(ll.FreezeUntil(1))
    weight = learn.model[1].weight.clone()
    learn.fit(1)
    assert not torch.equal(learn.model[1].weight, weight)


def trained(learn):
    return [p.requires_grad for p in learn.model.parameters()]


@pytest.mark.parametrize("n_epoch", [1, 3])
def test_afterwards_that_is_trained_which_was_before(n_epoch):
    learn = learner(ll.FreezeUntil(2), train_bn=False)
    learn.freeze_to(1)
    before = trained(learn)
    learn.fit(n_epoch)
    assert trained(learn) == before == [False] * 4 + [True] * 6


def test_groups_that_do_not_exist_are_refused():
    learn = toy_learner(cbs=ll.FreezeUntil(1))
    with pytest.raises(ValueError, match=r"names none of the 1 parameter groups[\s\S]*`Learner\(splitter=…\)`"):
        learn.fit(1)


def weights(learn):
    return [p.tolist() for p in learn.model.parameters()]


@pytest.mark.parametrize("stop", [(0, "after_batch"), (1, "after_epoch"), (2, "after_batch")])
def test_a_new_process_that_goes_on_unfreezes_in_time(stop):
    def press(cb):
        if cb.learn.epoch == stop[0] and not cb.learn.interrupted:
            signal.raise_signal(signal.SIGINT)

    whole = learner(ll.FreezeUntil(2))
    whole.fit(3)
    stopped = learner(ll.FreezeUntil(2), ll.Callback(**{stop[1]: press}))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(3)
    learn = learner(ll.FreezeUntil(2))
    learn.load_state_dict(stopped.state_dict())
    learn.resume()
    assert weights(learn) == weights(whole)
    assert all(trained(learn))


def test_a_fit_that_was_stopped_goes_on_exactly():
    assert_resumes_exactly(lambda: learner(ll.FreezeUntil(1), ll.BnFreeze(), train_bn=False, n_train=16, n_valid=8))


@pytest.mark.parametrize("make", [lambda: ll.FreezeUntil(1), ll.BnFreeze])
def test_they_keep_every_promise(make):
    def make_learner():
        learn = learner(n_train=16, n_valid=8, train_bn=False)
        learn.freeze_to(1)
        return learn

    check_callback(make, make_learner)
