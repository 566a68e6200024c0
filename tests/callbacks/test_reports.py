"""What all reporters have in common: when they report what, how they end, and that they leave nothing behind."""

import gc
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

import learnloop as ll
from learnloop.callbacks.reports import Reports, description, numbers_of_batch, numbers_of_row
from learnloop.testing import check_callback, toy_learner
from tests.toys import Once, raise_at, raising


class Written(Reports):
    """Writes into a list."""

    def __init__(self, every=2):
        super().__init__(every)
        self.calls = []

    def begin(self):
        self.calls.append("begin")
        return "opened"

    def write_step(self, step, numbers):
        self.calls.append(("step", step))

    def write_row(self, step, row):
        self.calls.append(("row", step, row["epoch"]))

    def end(self, how):
        self.calls.append(how)


def test_steps_and_rows_come_between_begin_and_end():
    cb = Written()
    toy_learner(cbs=cb).fit(2)
    steps = [("step", 2), ("step", 4), ("row", 4, 0), ("step", 6), ("step", 8), ("row", 8, 1)]
    assert cb.calls == ["begin", *steps, "done"]


def test_steps_go_on_in_the_next_fit():
    cb = Written(every=None)
    learn = toy_learner(cbs=cb)
    learn.fit(1)
    learn.fit(1)
    assert cb.calls == ["begin", ("row", 4, 0), "done", "begin", ("row", 8, 0), "done"]


def test_a_fit_that_counts_updates_has_a_row_per_stretch():
    cb = Written(every=3)
    toy_learner(cbs=cb).fit(n_step=6, valid_every=3)
    assert cb.calls == ["begin", ("step", 3), ("row", 3, 0), ("step", 6), ("row", 6, 1), "done"]


@pytest.mark.parametrize(
    ("action", "raised", "how"),
    [
        (raising(ZeroDivisionError()), ZeroDivisionError, "error"),
        (lambda cb: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, "interrupted"),
        (raising(KeyboardInterrupt()), KeyboardInterrupt, "interrupted"),
        (lambda cb: cb.learn.remove_cb(Written), None, "removed"),
        (raising(ll.CancelFitException()), None, "done"),
    ],
)
def test_it_is_told_how_the_fit_ended(action, raised, how):
    cb = Written()
    learn = toy_learner(cbs=cb)
    if raised is None:
        learn.fit(1, cbs=Once("after_loss", action))
    else:
        with pytest.raises(raised):
            learn.fit(1, cbs=Once("after_loss", action))
    assert cb.calls == ["begin", how] and cb.target is None


def test_a_fit_inside_of_an_except_clause_has_not_failed():
    cb = Written(every=None)
    try:
        raise KeyError
    except KeyError:
        toy_learner(cbs=cb).fit(1)
    assert cb.calls[-1] == "done"


def test_an_error_in_begin_is_the_users_and_ends_nothing():
    class Broken(Written):
        def begin(self):
            raise PermissionError("no")

    cb = Broken()
    with pytest.raises(PermissionError):
        toy_learner(cbs=cb).fit(1)
    assert cb.calls == []


@pytest.mark.parametrize("method", ["write_step", "write_row", "end"])
def test_a_later_error_warns_once_and_the_training_goes_on(method):
    cb = Written()
    setattr(cb, method, lambda *_: 1 / 0)
    learn = toy_learner(cbs=cb)
    with pytest.warns(UserWarning, match="`Written` stopped reporting: ZeroDivisionError: division by zero") as caught:
        learn.fit(2)
    assert len(caught) == 1 and len(learn.recorder.values) == 2
    assert cb.calls[-1] == ("error" if method != "end" else ("row", 8, 1))


def test_only_the_first_process_reports(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    cb = Written()
    toy_learner(cbs=cb).fit(1)
    assert cb.calls == []


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_are_not_reported(run):
    cb = Written()
    run(toy_learner(cbs=cb))
    assert cb.calls == []


# The numbers


def test_the_numbers_of_a_batch_are_epochs_losses_and_hypers_of_each_group():
    seen = []
    look = ll.Callback(after_batch=lambda cb: cb.training and seen.append(numbers_of_batch(cb.learn)))
    look.order = 100
    learn = toy_learner(cbs=look, splitter=lambda model: [list(model[0].parameters()), list(model[2].parameters())])
    learn.fit(1, slice(0.01, 0.1))
    assert seen[-1] == {
        "epoch": 1.0,
        "train_loss": learn.recorder.losses[-1].item(),
        "raw_loss": learn.recorder.raw_losses[-1],
        **{"lr_0": pytest.approx(0.01), "mom_0": 0.0, "wd_0": 0.0},
        **{"lr_1": pytest.approx(0.1), "mom_1": 0.0, "wd_1": 0.0},
    }


def test_a_batch_without_a_loss_and_a_learner_without_a_recorder_are_reported_too():
    seen = []
    look = ll.Callback(after_batch=lambda cb: cb.training and seen.append(numbers_of_batch(cb.learn)))
    learn = toy_learner(cbs=[look, raise_at("before_batch", ll.CancelBatchException())])
    learn.remove_cb(ll.Recorder)
    learn.fit(1)
    assert [sorted(numbers) for numbers in seen[:2]] == [
        ["epoch", "lr_0", "mom_0", "wd_0"],
        ["epoch", "lr_0", "mom_0", "raw_loss", "wd_0"],
    ]


def test_a_row_has_the_columns_that_are_numbers():
    row = {
        "epoch": 1,
        "train_loss": 0.5,
        "valid_loss": math.nan,
        "f1": None,
        "name": "x",
        "accuracy": 1,
        "time": "00:01",
    }
    assert list(numbers_of_row(row)) == ["valid_loss", "accuracy"]


def test_a_function_as_a_model_and_a_loss_is_described_too():
    learn = toy_learner(model=lambda x: x[:, :1])
    learn.opt = type("Opt", (), {"hypers": []})()
    found = description(learn)
    assert (found["model"], found["n_params"], found["loss_func"], found["lr"]) == ("function", 0, "MSELoss", [])


def test_it_keeps_the_promises():
    assert check_callback(Written, events=("before_fit", "after_loss", "after_batch", "after_epoch")).broken == {}


# A long training


def all_loggers(folder):
    """Every reporter that is installed, and a notifier whose server is not there."""
    cbs = [ll.CSVLogger(), ll.JSONLLogger(every=10), ll.ShowGraphCallback(), ll.Notify(every=1, pause=0.01, retries=0)]
    try:
        import tensorboard  # noqa: F401

        from learnloop.integrations.tensorboard import TensorBoardCallback
    except ImportError:
        return cbs
    return [*cbs, TensorBoardCallback(folder / "runs", trace_model=False)]


def held():
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = [t for t in threading.enumerate() if t.name != "learnloop-notify"]
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return descriptors, len(threads), tensors


def check_that_nothing_grows(folder, monkeypatch, n_epoch):
    monkeypatch.setenv("WEBHOOK_URL", "http://127.0.0.1:9")  # where nobody listens
    seen = []
    look = ll.Callback(before_epoch=lambda cb: cb.epoch % max(1, n_epoch // 10) or seen.append(held()))
    learn = toy_learner(n_train=800, n_valid=16, cbs=[*all_loggers(folder), look])
    learn.path = folder
    before = held()
    learn.fit(n_epoch)
    descriptors, threads, tensors = zip(*seen[1:], strict=True)
    assert max(descriptors) <= min(descriptors) + 1 and max(threads) == min(threads)  # 1: a message that is being sent
    # The loop keeps its losses in blocks, one for each time that somebody looks, and joins them at 1,024.
    assert max(tensors) - min(tensors) < min(20 * n_epoch, 1100)
    after = held()
    assert after[1] == before[1] and after[0] <= before[0] + 1


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")


@needs_proc
def test_with_all_loggers_on_no_file_no_thread_and_no_tensor_stays(tmp_path, monkeypatch):
    check_that_nothing_grows(tmp_path, monkeypatch, n_epoch=5)


@needs_proc
@pytest.mark.slow
def test_nor_in_ten_thousand_batches_and_memory_stays_as_it_is(tmp_path, monkeypatch):
    import psutil

    process = psutil.Process()
    check_that_nothing_grows(tmp_path, monkeypatch, n_epoch=20)  # so that what grows once has grown
    before = process.memory_info().rss
    check_that_nothing_grows(tmp_path, monkeypatch, n_epoch=100)
    assert process.memory_info().rss - before < 20 * 2**20
