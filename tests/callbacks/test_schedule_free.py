"""ScheduleFreeCallback: weights of training in training, averaged weights everywhere else."""

import copy

import pytest
import torch

from learnloop import Callback, ScheduleFreeCallback
from learnloop.testing import toy_learner

schedulefree = pytest.importorskip("schedulefree")


def learner(cbs=(), **kwargs):
    torch.manual_seed(0)
    opt_func = schedulefree.AdamWScheduleFree
    return toy_learner(opt_func=opt_func, cbs=[ScheduleFreeCallback(), *cbs], **kwargs)


def mode(learn):
    return "train" if learn.opt.opt.param_groups[0]["train_mode"] else "eval"


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()


def test_the_optimizer_is_in_the_mode_of_the_phase():
    seen = []
    events = ("before_batch", "after_epoch", "after_fit")
    learn = learner([Callback(**{e: lambda cb, e=e: seen.append((e, cb.training, mode(cb.learn))) for e in events})])
    learn.fit(2)
    assert list(dict.fromkeys(seen)) == [
        ("before_batch", True, "train"),
        ("before_batch", False, "eval"),
        ("after_epoch", False, "eval"),
        ("after_fit", False, "eval"),
    ]


def test_after_a_fit_the_model_is_what_the_package_itself_gives():
    learn, batches = learner(n_train=24, lr=0.01), []
    learn.add_cb(Callback(before_batch=lambda cb: batches.append((cb.x, cb.y)) if cb.training else None))
    model = copy.deepcopy(learn.model)
    learn.fit(1)
    opt = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    opt.train()
    for x, y in batches:
        learn.loss_func(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    opt.eval()
    ours, theirs = weights(learn), torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    assert ours == pytest.approx(theirs, abs=1e-7)


def test_a_validation_inside_a_training_phase_sees_averages_and_moves_nothing():
    seen = []

    def look(cb):
        if cb.training and cb.iter == 1:
            seen.append(mode(cb.learn))
            cb.learn.validate()
            seen.append(mode(cb.learn))

    plain, looked = learner(), learner([Callback(after_batch=look)])
    plain.fit(2)
    looked.fit(2)
    assert seen == ["train"] * 4
    assert weights(plain) == weights(looked)


def test_an_error_leaves_the_averages_in_the_model():
    def fail(cb):
        raise RuntimeError("no")

    learn = learner([Callback(after_step=fail)])
    with pytest.raises(RuntimeError, match="no"):
        learn.fit(1)
    assert mode(learn) == "eval"


def test_a_state_saved_after_a_fit_goes_on_to_the_very_weights():
    learn, other = learner(), learner()
    learn.fit(1)
    other.load_state_dict(learn.state_dict())
    for one in (learn, other):
        one.fit(1)
    assert weights(learn) == weights(other)


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="needs an optimizer with `train\\(\\)` and `eval\\(\\)`, but this is SGD"):
        toy_learner(cbs=ScheduleFreeCallback()).fit(1)


def test_validating_before_the_first_fit_works():
    learner().validate()
