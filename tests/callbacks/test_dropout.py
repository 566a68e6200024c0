"""MCDropoutCallback: dropout stays on, calls differ, and a training beside them moves as documented."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.data.keyed import draw_seed
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


class LockedDropout(nn.Module):
    """A layer of dropout that is none of torch's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.5)

    def forward(self, x):
        return self.inner(x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), LockedDropout(), nn.Linear(32, 1))


def learner(*cbs, **kwargs):
    return toy_learner(model=network(), cbs=cbs, lr=0.01, **kwargs)


def stream():
    return torch.get_rng_state().tolist()


def test_only_dropout_is_in_train_mode_in_validation():
    seen = []
    note = ll.Callback(before_batch=lambda cb: seen.append([m.training for m in cb.model.modules()]))
    learn = learner(n_train=8, n_valid=8)
    learn.model.train()
    learn.validate(cbs=[ll.MCDropoutCallback(), note])
    assert seen == [[False, False, False, True, True, True, False]]
    assert all(m.training for m in learn.model.modules())


def test_two_calls_differ_and_without_it_they_do_not():
    learn = learner()
    first, second = (learn.validate(cbs=ll.MCDropoutCallback())[0] for _ in range(2))
    assert first != second
    assert learn.validate()[0] == learn.validate()[0]


def test_the_same_seed_gives_the_same_calls():
    def losses():
        learn = learner()
        torch.manual_seed(1)
        return [learn.validate(cbs=ll.MCDropoutCallback())[0] for _ in range(3)]

    assert losses() == losses()
    assert len(set(losses())) == 3


def test_the_mean_over_many_calls_is_near_the_prediction_without_dropout():
    preds = []
    note = ll.Callback(after_pred=lambda cb: preds.append(cb.pred.mean()))
    learn = learner(n_valid=16, bs=16)
    for _ in range(600):
        learn.validate(cbs=[ll.MCDropoutCallback(), note])
    samples = torch.stack(preds)
    preds.clear()
    learn.validate(cbs=note)
    error = samples.std() / len(samples) ** 0.5
    assert abs(samples.mean() - preds[0]) < 4 * error  # four standard errors of the mean
    assert samples.std() > 0.01


def test_a_call_moves_the_global_stream_by_one_draw():
    learn = learner()
    torch.manual_seed(5)
    learn.validate(cbs=ll.MCDropoutCallback())
    moved = stream()
    torch.manual_seed(5)
    draw_seed()
    assert moved == stream()


def test_a_call_that_fails_moves_nothing():
    learn = learner()
    before = stream()
    with pytest.raises(ZeroDivisionError):
        learn.validate(cbs=[ll.MCDropoutCallback(), ll.Callback(after_pred=lambda cb: 1 / 0)])
    assert stream() == before


def test_the_validations_of_a_fit_move_its_stream_by_one_draw_each_however_long_they_are():
    def weights(n_valid):
        learn = learner(ll.MCDropoutCallback(), n_valid=n_valid)
        torch.manual_seed(2)
        learn.fit(3)
        return [p.tolist() for p in learn.model.parameters()]

    assert weights(8) == weights(24)  # with dropout in training too


def test_a_nested_run_inside_a_validation_leaves_it_as_it_was():
    modes = []

    def nested(cb):
        if not cb.training and cb.learn.task == "fit":
            cb.learn.validate()
            modes.append([m.training for m in cb.model.modules()])

    learner(ll.MCDropoutCallback(), ll.Callback(before_batch=nested), n_valid=8).fit(1)
    assert modes == [[False, False, False, True, True, True, False]]


def test_a_fit_that_was_stopped_goes_on_exactly():
    assert_resumes_exactly(lambda: learner(ll.MCDropoutCallback()), every=7)


def test_it_keeps_every_promise():
    check_callback(
        ll.MCDropoutCallback,
        lambda: learner(n_train=16, n_valid=8),
        events=["before_fit", "after_loss", "before_validate", "after_validate"],
    )
