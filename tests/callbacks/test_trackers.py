"""TrackerCallback and those that act on what it finds.

Where a line says so, decisions and rates are those of fastai 2.8.12, run with the same values.
"""

import math
import operator
import re
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

import learnloop as ll
from learnloop.callbacks.trackers import is_better, smaller_is_better, worst_of
from learnloop.testing import EventLog, check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

NAN = math.nan


class Scripted(ll.Metric):
    """A metric with given values, one per epoch; None where the phase brought none."""

    def __init__(self, values, name="score"):
        self.values, self.title, self.epoch = values, name, None

    def accumulate(self, learn):
        self.epoch = learn.epoch

    @property
    def value(self):
        return None if self.epoch is None else self.values[self.epoch]

    @property
    def name(self):
        return self.title


def scripted(values, *cbs, name="score", **kwargs):
    """A learner whose metric `score` takes these values."""
    return toy_learner(n_train=16, n_valid=8, metrics=Scripted(values, name), cbs=cbs, **kwargs)


def file_of(learn, name):
    return learn.path / learn.model_dir / f"{name}.pth"


def weights(learn):
    return [p.tolist() for p in learn.model.parameters()]


def weights_after(n_epoch):
    learn = scripted([0.0] * n_epoch)
    learn.fit(n_epoch)
    return weights(learn)


class Notes(ll.Callback):
    """What a tracker knows at the end of each epoch."""

    order = 100

    def __init__(self, tracker, *names):
        self.tracker, self.names, self.seen = tracker, names, []

    def after_epoch(self):
        self.seen.append(tuple(getattr(self.tracker, n) for n in self.names))


def noted(tracker, values, *names, **kwargs):
    notes = Notes(tracker, *names)
    learn = scripted(values, tracker, notes, **kwargs)
    learn.fit(len(values))
    return notes.seen


def press_ctrl_c_in_epoch(epoch):
    def press(cb):
        if cb.learn.epoch == epoch and cb.learn.training:
            signal.raise_signal(signal.SIGINT)

    return ll.Callback(after_batch=press)


# Decisions


@pytest.mark.parametrize("name", ["valid_loss", "train_loss", "error_rate", "rmse", "valid_mae", "perplexity"])
def test_of_losses_and_errors_smaller_is_better(name):
    assert smaller_is_better(name)


@pytest.mark.parametrize("name", ["accuracy", "valid_accuracy", "f1_score", "dice", "roc_auc_score", "msecret"])
def test_of_anything_else_larger_is_better(name):
    assert not smaller_is_better(name)


@pytest.mark.parametrize("comp", [operator.lt, operator.le, np.less, lambda a, b: a < b, torch.lt])
def test_any_comparison_that_prefers_less_starts_from_infinity(comp):
    comp = comp if comp is not torch.lt else lambda a, b: torch.lt(torch.tensor(a), torch.tensor(b))
    assert worst_of(comp) == math.inf
    assert is_better(3.0, math.inf, comp)
    assert [is_better(value, 3.0, comp, -0.5) for value in (2.0, 2.75, 4.0)] == [True, False, False]


@pytest.mark.parametrize("comp", [operator.gt, operator.ge, np.greater])
def test_any_comparison_that_prefers_more_starts_from_minus_infinity(comp):
    assert worst_of(comp) == -math.inf
    assert [is_better(value, 3.0, comp, 0.5) for value in (4.0, 3.25, 2.0)] == [True, False, False]


@pytest.mark.parametrize("value", [None, NAN])
def test_what_is_no_number_is_never_better(value):
    assert not is_better(value, math.inf, operator.le)
    assert not is_better(value, -math.inf, operator.ge)


def nearer_to_one(a, b):
    return abs(a - 1) < abs(b - 1)


# TrackerCallback


def test_it_keeps_the_best_value_and_says_whether_it_is_of_this_epoch():
    seen = noted(ll.TrackerCallback("score"), [1.0, 3.0, 2.0, 4.0], "best", "new_best", "wait")
    assert seen == [(1.0, True, 0), (3.0, True, 0), (3.0, False, 1), (4.0, True, 0)]


@pytest.mark.parametrize(
    ("comp", "min_delta", "bests"),
    [
        (operator.lt, 0.0, [3, 2, 2, 2, 1.9, 1.9, 1.9, 1.9]),
        (np.less, 0.2, [3, 2, 2, 2, 2, 2, 2, 2]),  # fastai's
        (np.less, 0.0, [3, 2, 2, 2, 1.9, 1.9, 1.9, 1.9]),  # fastai's
        (operator.gt, 0.0, [3] * 8),
        (nearer_to_one, 0.0, [3, 2, 2, 2, 1.9, 1.9, 1.9, 1.9]),
    ],
)
def test_any_comparison_of_two_values_decides(comp, min_delta, bests):
    tracker = ll.TrackerCallback("score", comp, min_delta)
    values = [3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.1, 2.2]
    assert [best for (best,) in noted(tracker, values, "best")] == bests


def test_none_says_nothing_and_nan_is_no_improvement():
    seen = noted(ll.TrackerCallback("score"), [1.0, None, NAN, 2.0, None], "best", "new_best", "wait")
    assert seen == [(1.0, True, 0), (1.0, False, 0), (1.0, False, 1), (2.0, True, 0), (2.0, False, 0)]


@pytest.mark.parametrize("event", ["before_validate", "before_train", "before_epoch"])
@pytest.mark.parametrize("column", ["valid_loss", "train_loss"])
def test_a_phase_or_epoch_that_was_cancelled_says_nothing(event, column):
    error = {
        "before_validate": ll.CancelValidException,
        "before_train": ll.CancelTrainException,
        "before_epoch": ll.CancelEpochException,
    }[event]

    def cancel(cb):
        if cb.learn.epoch == 1:
            raise error

    tracker = ll.TrackerCallback(column)
    notes = Notes(tracker, "new_best", "wait")
    toy_learner(cbs=[tracker, notes, ll.Callback(**{event: cancel})]).fit(2)
    is_silent = event == "before_epoch" or column.startswith("valid") == (event == "before_validate")
    assert (notes.seen[-1] == (False, 0)) is is_silent


def test_every_fit_has_a_best_of_its_own_unless_it_is_told_otherwise():
    for reset, best in ((True, 0.5), (False, 2.0)):
        tracker = ll.TrackerCallback("score", reset_on_fit=reset)
        learn = scripted([1.0, 2.0], tracker)
        learn.fit(2)
        learn.metrics[0].values = [0.5, 0.5]
        learn.fit(2)
        assert tracker.best == best


def test_before_a_value_the_best_is_infinite():
    tracker = ll.TrackerCallback("train_loss")
    assert tracker.best is None
    seen = []
    toy_learner(cbs=[tracker, ll.Callback(before_train=lambda cb: seen.append(tracker.best))]).fit(1)
    assert seen == [math.inf]


def test_its_idx_is_the_place_of_the_column_in_a_row():
    tracker = ll.TrackerCallback("score")
    learn = scripted([7.0], tracker)
    learn.fit(1)
    assert learn.recorder.values[-1][tracker.idx] == 7.0


@pytest.mark.parametrize(
    ("monitor", "hint"), [("valid_score", "score"), ("vald_loss", "valid_loss"), ("time", "train_loss")]
)
def test_an_unknown_column_is_refused_before_the_fit_with_those_that_are_known(monitor, hint):
    log = EventLog(cleanups=False)
    learn = scripted([1.0], log, ll.EarlyStoppingCallback(monitor))
    log.events.clear()
    message = (
        f"EarlyStoppingCallback monitors `{monitor}`, but this fit records train_loss, valid_loss, score. "
        f'Pass `monitor="{hint}"`.'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        learn.fit(1)
    assert log.events == ["before_fit"]


def test_without_validation_only_the_training_loss_is_known():
    with pytest.raises(ValueError, match=r'but this fit records train_loss. Pass `monitor="train_loss"`'):
        toy_learner(n_valid=0, cbs=ll.TrackerCallback()).fit(1)


def test_without_a_recorder_there_is_nothing_to_track():
    with pytest.raises(RuntimeError, match="TrackerCallback reads the Recorder's rows"):
        toy_learner(default_cbs=False, cbs=ll.TrackerCallback()).fit(1)


def test_a_comparison_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="`comp='less'`: pass a comparison"):
        ll.TrackerCallback(comp="less")


def test_whatever_its_order_it_reads_a_row_that_is_there():
    tracker = ll.TrackerCallback("train_loss")
    tracker.order = -50
    toy_learner(cbs=tracker).fit(1)
    assert tracker.new_best


def test_validate_and_lr_find_leave_it_alone():
    tracker = ll.EarlyStoppingCallback("score")
    learn = scripted([1.0, 2.0], tracker)
    learn.fit(2)
    state = tracker.state_dict()
    assert len(learn.validate()) == 2
    learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())
    assert tracker.state_dict() == state


def test_a_fit_that_starts_at_a_later_epoch_is_tracked_from_there():
    tracker = ll.TrackerCallback("score")
    learn = scripted([9.0, 1.0, 2.0], tracker)
    learn.fit(3, start_epoch=1)
    assert tracker.best == 2.0


def test_skipped_epochs_say_nothing():
    seen = noted(ll.TrackerCallback("score"), [9.0, 1.0, 2.0], "best", "wait")
    assert len(seen) == 3
    tracker = ll.TrackerCallback("score")
    learn = scripted([9.0, 1.0, 2.0], tracker, ll.SkipToEpoch(1))
    learn.fit(3)
    assert (tracker.best, tracker.wait) == (2.0, 0)


def test_a_fit_by_steps_is_tracked_at_each_validation():
    tracker = ll.TrackerCallback("score")
    learn = scripted([1.0, 5.0, 2.0], tracker)
    learn.fit(n_step=6, valid_every=2)
    assert (tracker.best, tracker.wait) == (5.0, 1)


# EarlyStoppingCallback


@pytest.mark.parametrize(
    ("kwargs", "last_epoch"),
    [
        ({"patience": 2}, 3),  # fastai's
        ({"patience": 3, "min_delta": 0.2}, 4),  # fastai's
        ({"patience": 1}, 2),
        ({"patience": 9}, 7),
        ({"patience": 1, "comp": np.greater}, 1),
    ],
)
def test_the_fit_ends_after_as_many_epochs_without_improvement(kwargs, last_epoch):
    stop = ll.EarlyStoppingCallback("score", **{"comp": np.less, **kwargs})
    learn = scripted([3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.1, 2.2], stop)
    learn.fit(8)
    assert learn.epoch == last_epoch
    assert len(learn.recorder.values) == last_epoch + 1


def test_it_says_since_when_and_within_no_logging_nothing(capsys):
    def text(logger):
        learn = scripted([3.0, 2.0, 1.0, 1.0], ll.EarlyStoppingCallback("score", patience=2))
        learn.logger = logger or learn.logger
        learn.fit(4)
        return capsys.readouterr().out

    assert text(lambda row: None) == "No improvement since epoch 0: early stopping\n"
    assert text(None) == ""


def test_epochs_without_a_value_are_not_waited_for():
    learn = scripted([3.0, None, None, 2.0, None, 1.0, 1.0], ll.EarlyStoppingCallback("score", patience=2))
    learn.fit(7)
    assert learn.epoch == 5


# ReduceLROnPlateau


def rates_of(values, *cbs, lr=0.1, **kwargs):
    rates = []
    note = ll.Callback(after_epoch=lambda cb: rates.append([h["lr"] for h in cb.opt.hypers]))
    note.order = 100
    scripted(values, *cbs, note, lr=lr, **kwargs).fit(len(values))
    return rates


@pytest.mark.parametrize("opt_func", [ll.SGD, torch.optim.SGD])
def test_the_rate_is_lowered_on_a_plateau_as_in_fastai(opt_func):
    reduce = ll.ReduceLROnPlateau("score", np.less, patience=1, factor=10, min_lr=0.005)
    rates = rates_of([3.0, 2.0, 2.5, 2.4, 1.9, 2.0, 2.1, 2.2], reduce, opt_func=opt_func)
    fastai = [0.1, 0.1, 0.01, 0.005, 0.005, 0.005, 0.005, 0.005]
    assert [rate for (rate,) in rates] == pytest.approx(fastai)


def test_after_lowering_it_waits_anew():
    rates = rates_of([1.0] * 6, ll.ReduceLROnPlateau("score", patience=2, factor=2))
    assert [rate for (rate,) in rates] == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_every_group_is_lowered_and_none_is_raised_to_the_least_rate():
    splitter = lambda m: [list(m[0].parameters()), list(m[2].parameters())]  # noqa: E731
    reduce = ll.ReduceLROnPlateau("score", factor=10, min_lr=0.02)
    rates = rates_of([1.0, 1.0], reduce, lr=[0.01, 0.1], splitter=splitter)
    assert rates == [[0.01, 0.1], [0.01, 0.02]]


def test_it_says_the_new_rate(capsys):
    learn = scripted([1.0, 1.0], ll.ReduceLROnPlateau("score"))
    learn.logger = lambda row: None
    learn.fit(2)
    assert capsys.readouterr().out == "Epoch 1: reducing lr to 0.01\n"


# SaveModelCallback


def saving(tmp_path, values, *cbs, n_epoch=None, **kwargs):
    learn = scripted(values, *cbs, path=tmp_path, **kwargs)
    learn.fit(n_epoch or len(values))
    return learn


def files(tmp_path):
    return sorted(f.name for f in (tmp_path / "models").glob("*.pth"))


def test_the_best_weights_are_saved_and_loaded_when_the_fit_is_over(tmp_path):
    saver = ll.SaveModelCallback("score")
    learn = saving(tmp_path, [1.0, 3.0, 2.0, 2.5], saver)
    assert weights(learn) == weights_after(2)
    assert files(tmp_path) == ["model.pth"]
    assert saver.last_saved_path == tmp_path / "models" / "model.pth"
    assert (saver.best, saver.fname, saver.every_epoch, saver.at_end, saver.with_opt) == (
        *(3.0, "model", False, False, False),
    )


def test_with_opt_the_state_of_the_optimizer_comes_back_too(tmp_path):
    def momenta(with_opt):
        saver = ll.SaveModelCallback("score", with_opt=with_opt)
        learn = saving(tmp_path, [3.0, 1.0], saver, opt_func=partial(ll.SGD, mom=0.9))
        return [learn.opt.state[p]["grad_avg"].tolist() for p in learn.model.parameters()]

    one_epoch = saving(tmp_path, [3.0], opt_func=partial(ll.SGD, mom=0.9))
    expected = [one_epoch.opt.state[p]["grad_avg"].tolist() for p in one_epoch.model.parameters()]
    assert momenta(True) == expected
    assert momenta(False) != expected


@pytest.mark.parametrize(
    ("every", "names"), [(True, ["model_0", "model_1", "model_2", "model_3"]), (3, ["model_0", "model_3"])]
)
def test_every_few_epochs_are_saved_under_their_number_and_nothing_is_loaded(tmp_path, every, names):
    saver = ll.SaveModelCallback(every_epoch=every)
    learn = saving(tmp_path, [3.0, 2.0, 1.0, 0.0], saver, n_epoch=4)
    assert files(tmp_path) == [f"{name}.pth" for name in names]  # fastai's names
    assert weights(learn) == weights_after(4)
    learn.load(names[0], with_opt=False)
    assert weights(learn) == weights_after(1)


def test_saving_every_few_epochs_needs_no_column(tmp_path):
    learn = toy_learner(n_valid=0, path=tmp_path, cbs=ll.SaveModelCallback(every_epoch=True))
    learn.fit(2)
    assert files(tmp_path) == ["model_0.pth", "model_1.pth"]


def test_every_few_updates_are_saved_under_their_number(tmp_path):
    saver = ll.SaveModelCallback(every_step=3, fname="run")
    learn = saving(tmp_path, [0.0] * 3, saver, ll.GradientAccumulation(8), n_epoch=3)
    assert files(tmp_path) == ["run_step3.pth", "run_step6.pth"]
    assert saver.last_saved_path.name == "run_step6.pth"
    learn.load("run_step6", with_opt=False)
    assert weights(learn) == weights_after(3)


def test_updates_after_the_phase_are_saved_too_and_cancelled_ones_are_not(tmp_path):
    class NoLength:
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    def cancel_first(cb):
        if cb.learn.epoch == 0:
            raise ll.CancelStepException

    learn = scripted(
        *([[0.0] * 3], ll.SaveModelCallback(every_step=1), ll.GradientAccumulation(100)),
        ll.Callback(before_step=cancel_first),
        path=tmp_path,
    )
    learn.dls = ll.DataLoaders(NoLength(list(learn.dls.train)), device="cpu")
    learn.fit(3)
    assert files(tmp_path) == ["model_step1.pth", "model_step2.pth"]


def test_at_end_the_last_weights_are_saved_and_nothing_is_loaded(tmp_path):
    learn = saving(tmp_path, [1.0, 3.0, 2.0], ll.SaveModelCallback("score", at_end=True))
    assert weights(learn) == weights_after(3)
    learn.load("model", with_opt=False)
    assert weights(learn) == weights_after(3)


def test_the_best_few_are_kept_and_the_very_best_is_loaded(tmp_path):
    saver = ll.SaveModelCallback("score", top_k=2)
    learn = saving(tmp_path, [1.0, 4.0, 2.0, 3.0, 3.0, None, NAN], saver)
    assert files(tmp_path) == ["model_1.pth", "model_3.pth"]
    assert [(value, name) for value, name, _ in saver.saved] == [(4.0, "model_1"), (3.0, "model_3")]
    assert weights(learn) == weights_after(2)


def test_files_of_others_are_never_deleted(tmp_path):
    def overwrite(cb):
        if cb.learn.epoch == 0:
            time.sleep(0.01)
            file_of(cb.learn, "model_0").write_bytes(b"mine")

    note = ll.Callback(after_epoch=overwrite)
    note.order = 100
    saving(tmp_path, [1.0, 2.0, 3.0], ll.SaveModelCallback("score", top_k=1 + 1), note)
    assert file_of(toy_learner(path=tmp_path), "model_0").read_bytes() == b"mine"


def test_a_file_of_an_earlier_fit_is_not_loaded(tmp_path):
    saver = ll.SaveModelCallback("score")
    learn = saving(tmp_path, [3.0, 1.0], saver)
    learn.metrics[0].values = [NAN, NAN]
    learn.fit(2)
    assert saver.last_saved_path is None

    other = scripted([0.0] * 2)
    other.fit(2)
    other.model.load_state_dict(weights_in(tmp_path))
    other.fit(2)
    assert weights(learn) == weights(other)


def weights_in(tmp_path):
    state = torch.load(tmp_path / "models" / "model.pth")
    return state.get("model", state)


def test_a_file_that_somebody_else_wrote_meanwhile_is_not_loaded(tmp_path):
    def overwrite(cb):
        time.sleep(0.01)
        file_of(cb.learn, "model").write_bytes(b"of someone else")

    note = ll.Callback(after_fit=overwrite)
    note.order = -100
    with pytest.warns(UserWarning, match="is not the file that SaveModelCallback wrote any more"):
        learn = saving(tmp_path, [3.0, 1.0], ll.SaveModelCallback("score"), note)
    assert weights(learn) == weights_after(2)


def test_with_one_best_over_all_fits_an_earlier_one_is_loaded(tmp_path):
    learn = saving(tmp_path, [3.0, 1.0], ll.SaveModelCallback("score", reset_on_fit=False))
    learn.metrics[0].values = [2.0, 2.0]
    learn.fit(2)
    assert weights(learn) == weights_after(1)


def test_the_path_is_set_once_the_file_is_written(tmp_path):
    saver = ll.SaveModelCallback("score")
    learn = scripted([1.0], saver, path=tmp_path)

    def fails(name, with_opt):
        raise OSError("disk full")

    learn.save = fails
    with pytest.raises(OSError, match="disk full"):
        learn.fit(1)
    assert (saver.last_saved_path, saver.saved) == (None, [])


def test_after_ctrl_c_nothing_is_loaded_or_saved_and_the_resumed_fit_loads_the_best(tmp_path):
    for number, (at_end, expected) in enumerate(((False, 1), (True, 4))):
        saver = ll.SaveModelCallback("score", at_end=at_end)
        learn = scripted([4.0, 3.0, 2.0, 1.0], saver, press_ctrl_c_in_epoch(2), path=tmp_path / str(number))
        with pytest.raises(KeyboardInterrupt):
            learn.fit(4)
        stopped = weights(learn)
        assert stopped not in (weights_after(1), weights_after(2), weights_after(3))
        learn.remove_cb(learn.cbs[-1])
        learn.resume()
        assert weights(learn) == weights_after(expected)


def test_a_new_process_that_goes_on_loads_the_best_of_the_one_before(tmp_path):
    values = [4.0, 3.0, 2.0, 1.0]
    stopped = scripted(values, ll.SaveModelCallback("score"), press_ctrl_c_in_epoch(2), path=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(4)
    learn = scripted(values, ll.SaveModelCallback("score"), path=tmp_path)
    learn.load_state_dict(stopped.state_dict())
    learn.resume()
    assert weights(learn) == weights_after(1)


def test_early_stopping_and_saving_go_together(tmp_path):
    cbs = [ll.EarlyStoppingCallback("score", patience=2), ll.SaveModelCallback("score")]
    learn = saving(tmp_path, [1.0, 2.0, 0.0, 0.0, 9.0], *cbs)
    assert learn.epoch == 3
    assert weights(learn) == weights_after(2)


def test_several_trackers_watch_different_columns(tmp_path):
    cbs = [
        ll.SaveModelCallback("score", fname="good"),
        ll.SaveModelCallback("train_loss", fname="low"),
        ll.SaveModelCallback(every_epoch=2, fname="good"),  # other names: good_0, good_2
        ll.ReduceLROnPlateau("score", patience=5),
        ll.TrackerCallback("valid_loss"),
    ]
    saving(tmp_path, [1.0, 3.0, 2.0], *cbs)
    assert files(tmp_path) == ["good.pth", "good_0.pth", "good_2.pth", "low.pth"]


def test_two_that_write_to_one_file_are_refused(tmp_path):
    learn = scripted([1.0], ll.SaveModelCallback("score"), ll.SaveModelCallback(), path=tmp_path)
    with pytest.raises(ValueError, match="two SaveModelCallbacks write to `model`"):
        learn.fit(1)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"every_epoch": True, "at_end": True}, "`every_epoch` and `at_end`"),
        ({"every_epoch": 2, "every_step": 5}, "`every_epoch` and `every_step`"),
        ({"top_k": 3, "at_end": True}, "`at_end` and `top_k`"),
    ],
)
def test_different_times_to_save_are_refused(kwargs, named):
    with pytest.raises(ValueError, match=f"{named} name different times to save"):
        ll.SaveModelCallback(**kwargs)


def test_to_keep_no_file_is_refused():
    with pytest.raises(ValueError, match="`top_k=0`: keep one file at least"):
        ll.SaveModelCallback(top_k=0)


def test_it_says_what_it_saved(tmp_path, capsys):
    learn = scripted([3.0, 1.0], ll.SaveModelCallback("score"), path=tmp_path)
    learn.logger = lambda row: None
    learn.fit(2)
    assert capsys.readouterr().out == "Better model found at epoch 0 with score value: 3.0.\n"


# Promises


def test_savers_act_before_the_rate_is_lowered_and_that_before_the_fit_is_stopped():
    assert ll.SaveModelCallback.order <= ll.ReduceLROnPlateau.order < ll.EarlyStoppingCallback.order
    assert ll.Recorder.order < ll.TrackerCallback.order


OF_EPOCHS = [f"{when}_{span}" for span in ("fit", "epoch", "validate") for when in ("before", "after")]
OF_STEPS = ["after_backward", "before_step", "after_step", "after_train"]


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (ll.SaveModelCallback, {}),
        (partial(ll.SaveModelCallback, every_step=1), {"events": OF_STEPS}),
        (ll.TrackerCallback, {"events": OF_EPOCHS}),
        (ll.EarlyStoppingCallback, {"events": OF_EPOCHS}),
        (partial(ll.ReduceLROnPlateau, "train_loss", np.greater), {"events": OF_EPOCHS}),
    ],
)
def test_trackers_keep_every_promise(make, kwargs):
    check_callback(make, lambda: toy_learner(n_train=16, n_valid=8), **kwargs)


@pytest.mark.parametrize(
    "cbs",
    [
        lambda: [ll.SaveModelCallback("score", top_k=2), ll.EarlyStoppingCallback("score", patience=2)],
        lambda: [ll.SaveModelCallback("score", with_opt=True), ll.ReduceLROnPlateau("score", patience=1)],
    ],
)
def test_a_tracked_fit_that_was_stopped_goes_on_exactly(cbs, tmp_path):
    def make():
        return scripted([2.0, 3.0, 1.0, 4.0, 1.0], *cbs(), path=tmp_path)

    assert_resumes_exactly(make, lambda learn: learn.fit(5), every=3)
