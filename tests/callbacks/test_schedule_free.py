"""ScheduleFreeCallback: weights of training in training, averaged weights everywhere else."""

import copy
import signal

import pytest
import torch

from learnloop import EMA, Callback, SaveModelCallback, ScheduleFreeCallback
from learnloop.testing import toy_learner

schedulefree = pytest.importorskip("schedulefree")


def learner(cbs=(), **kwargs):
    torch.manual_seed(0)
    kwargs = {"opt_func": schedulefree.AdamWScheduleFree, **kwargs}
    return toy_learner(cbs=[ScheduleFreeCallback(), *cbs], **kwargs)


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


def in_training(action, at=4):
    """A callback that acts once, after a batch of the second epoch."""

    def act(cb):
        if cb.training and cb.learn.train_iter == at:
            action(cb.learn)

    return Callback(after_batch=act)


def test_a_state_taken_in_a_validation_inside_a_training_phase_holds_the_weights_of_training():
    trained, found = [], []

    def look(learn):
        trained.append(weights(learn))
        learn.validate(cbs=Callback(before_batch=lambda cb: take(cb.learn)))

    def take(learn):
        before, state = weights(learn), learn.state_dict()
        found.append(torch.cat([t.flatten() for t in state["model"].values()]).tolist())
        assert state["opt"]["hypers"][0]["train_mode"]
        assert (weights(learn), mode(learn)) == (before, "eval")
        assert before != trained[0]

    learner([in_training(look)], n_valid=8).fit(2)
    assert found == trained


# Files


def sgd_learner(*args, **kwargs):
    """One whose optimizer gathers nothing but the weights that it steps on."""
    return learner(*args, **{"opt_func": schedulefree.SGDScheduleFree, **kwargs})


def test_the_weights_that_are_written_are_those_that_were_scored(tmp_path):
    learn = learner([SaveModelCallback(every_epoch=True)], path=tmp_path)
    learn.fit(2)
    for epoch, row in enumerate(learn.recorder.values):
        assert learner(path=tmp_path).load(f"model_{epoch}", with_opt=False).validate()[0] == row[1]


def test_a_tracker_loads_the_weights_that_scored_best(tmp_path):
    def turn_uphill(cb):
        for p in cb.learn.model.parameters() if cb.epoch >= 2 else ():
            p.grad.neg_()

    learn = learner([SaveModelCallback(), Callback(before_step=turn_uphill)], lr=0.05, path=tmp_path)
    learn.fit(6)
    losses = [row[1] for row in learn.recorder.values]
    assert losses[-1] > min(losses)
    assert learn.validate()[0] == min(losses)


def test_within_a_training_phase_the_weights_of_training_are_written(tmp_path):
    inside = []

    def save(learn):
        learn.save("inside")
        inside.append(weights(learn))

    learn = learner([in_training(save)], path=tmp_path)
    learn.fit(2)
    assert weights(learner(path=tmp_path).load("inside", with_opt=False)) == inside[0]


def test_a_file_of_a_training_phase_gives_its_averages_once_it_is_loaded_with_the_optimizer(tmp_path):
    learn = learner([SaveModelCallback(every_step=3, with_opt=True)], n_train=24, path=tmp_path)
    learn.fit(1)
    loaded = learner(path=tmp_path).load("model_step3", with_opt=True)
    assert mode(loaded) == "eval"
    assert weights(loaded) == pytest.approx(weights(learn), abs=1e-6)


def test_loaded_without_the_optimizer_weights_begin_a_new_average(tmp_path):
    other, used, new = (sgd_learner(path=tmp_path) for _ in range(3))
    other.fit(3)
    other.save("other", with_opt=False)
    used.fit(2)
    for learn in (used, new):
        learn.load("other", with_opt=False)
        torch.manual_seed(1)
        learn.fit(1)
    assert weights(used) == weights(new)


def test_loaded_with_the_optimizer_a_training_goes_on_with_the_average_of_the_file(tmp_path):
    whole, other = learner(path=tmp_path), learner(path=tmp_path)
    whole.fit(1)
    whole.save("half")
    other.load("half", with_opt=True)
    for learn in (whole, other):
        torch.manual_seed(1)
        learn.fit(1)
    assert weights(whole) == weights(other)


@pytest.mark.parametrize("with_opt", [True, False])
def test_loaded_within_a_training_phase_they_are_trained_on(with_opt, tmp_path):
    other, modes = learner(path=tmp_path), []
    other.fit(1)
    other.save("other")

    def load(learn):
        learn.load("other", with_opt=with_opt)
        modes.append(mode(learn))

    learn = learner([in_training(load)], path=tmp_path)
    learn.fit(2)
    assert modes == ["train"]
    assert mode(learn) == "eval"


def test_loaded_in_a_validation_inside_a_training_phase_they_stay(tmp_path):
    other, kept = learner(path=tmp_path), []
    other.fit(1)
    other.save("other")

    def look(learn):
        learn.validate(cbs=Callback(after_validate=lambda cb: cb.learn.load("other", with_opt=False)))
        kept.append((weights(learn), mode(learn)))

    learner([in_training(look)], path=tmp_path).fit(2)
    assert kept == [(weights(other), "train")]


def test_loading_before_there_is_an_optimizer_works(tmp_path):
    learner(path=tmp_path).save("new")
    assert weights(learner(path=tmp_path).load("new", with_opt=False)) == weights(learner())


def test_a_fit_that_was_stopped_goes_on_to_the_very_weights_here_and_from_its_state():
    def stop(cb):
        if cb.training and cb.train_iter == 7 and not resumed:
            signal.raise_signal(signal.SIGINT)

    resumed = []
    plain, stopped, other = learner(), learner([Callback(after_batch=stop)]), learner()
    plain.fit(3)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(3)
    resumed.append(True)
    other.load_state_dict(stopped.state_dict())
    for one in (stopped, other):
        one.resume()
    assert weights(plain) == weights(stopped) == weights(other)
    assert mode(stopped) == mode(other) == "eval"


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="needs an optimizer with `train\\(\\)` and `eval\\(\\)`, but this is SGD"):
        toy_learner(cbs=ScheduleFreeCallback()).fit(1)


def test_further_averages_are_refused():
    with pytest.raises(ValueError, match=r"\[EMA\] would average weights that the optimizer averages already"):
        learner([EMA()]).fit(1)


def test_one_switches_the_optimizer_and_a_second_is_refused():
    with pytest.raises(
        ValueError, match=r"\[ScheduleFreeCallback, ScheduleFreeCallback\] would each switch the optimizer"
    ):
        learner([ScheduleFreeCallback()]).fit(1)


def test_validating_before_the_first_fit_works():
    learner().validate()
