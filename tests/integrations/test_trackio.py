"""TrackioCallback against the real package with its local database."""

import sys

import pytest

import learnloop as ll
from learnloop.integrations.trackio import TrackioCallback
from learnloop.testing import check_callback, toy_learner
from tests.toys import Once, raising

trackio = pytest.importorskip("trackio")


@pytest.fixture(autouse=True)
def local(monkeypatch, tmp_path):
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path, raising=False)


def logged(run):
    from trackio.sqlite_storage import SQLiteStorage

    found = SQLiteStorage.get_logs("toy", run)
    return [(log["step"], {k: v for k, v in log.items() if k not in ("step", "timestamp")}) for log in found]


def learner(**kwargs):
    return toy_learner(cbs=TrackioCallback("toy", **{"every": 2, "auto_log_cpu": False, **kwargs}))


def test_losses_hypers_and_columns_are_logged():
    learn = learner(name="a")
    learn.fit(1)
    losses = learn.recorder.raw_losses
    smooth = [loss.item() for loss in learn.recorder.losses]
    hypers = {"lr_0": 0.1, "mom_0": 0.0, "wd_0": 0.0}
    assert logged("a") == [
        (2, {"epoch": 0.5, "train_loss": smooth[1], "raw_loss": losses[1], **hypers}),
        (4, {"epoch": 1.0, "train_loss": smooth[3], "raw_loss": losses[3], **hypers}),
        (4, {"valid_loss": learn.final_record[1]}),
    ]


def test_several_fits_are_one_run_and_each_is_finished():
    learn = learner(name="b", every=4)
    learn.fit(1)
    assert trackio.context_vars.current_run.get() is None
    learn.fit(1)
    assert [step for step, numbers in logged("b") if "raw_loss" in numbers] == [4, 8]


def test_it_is_finished_after_an_error():
    with pytest.raises(ZeroDivisionError):
        learner().fit(1, cbs=Once("after_loss", raising(ZeroDivisionError())))
    assert trackio.context_vars.current_run.get() is None


@pytest.mark.parametrize(
    "run", [ll.Learner.validate, ll.Learner.get_preds, lambda learn: learn.lr_find(show_plot=False)]
)
def test_other_runs_begin_none(tmp_path, run):
    run(learner())
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match=r"`TrackioCallback` needs trackio: `pip install 'learnloop\[trackio\]'`"):
        learner().fit(1)


def test_it_keeps_the_promises():
    assert TrackioCallback.reads_only
    report = check_callback(lambda: TrackioCallback("toy", every=1, auto_log_cpu=False), events=["after_loss"])
    assert report.broken == {}
