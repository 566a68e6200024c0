"""Fit after fit in one process: memory, open files, hooks and threads stay as they are after the first few."""

import gc
import os
import resource
import threading
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

import learnloop as ll
from learnloop.checks.library import made
from learnloop.checks.traces import hooks
from learnloop.testing import toy_learner

OPEN_FILES = Path("/proc/self/fd")
BROAD = (
    *("ActivationStats", "CSVLogger", "Checkpoint", "EMA", "GradientClip", "GradientStats", "HookCallback"),
    *("JSONLLogger", "MixUp", "MixedPrecision", "ParamScheduler", "ProgressCallback", "SampleLosses"),
    *("SaveModelCallback", "ShowGraphCallback", "TerminateOnNaNCallback"),
)
#: How fits end, one after the other.
ENDS = [None, ValueError, ll.CancelFitException, None, ll.CancelBatchException, ll.CancelEpochException, RuntimeError]
EVENTS = ["after_loss", "before_step", "before_validate", "after_epoch", "after_batch"]
A_LITTLE = 64  # KiB: what the interpreter itself keeps here and there


def end_early(error, event):
    def act(cb):
        raise error("planned")

    return ll.Callback(**{event: act})


def fit(learn, i):
    """Fit number `i`: with its own way to end."""
    error = ENDS[i % len(ENDS)]
    cbs = [] if error is None else [end_early(error, EVENTS[i % len(EVENTS)])]
    with suppress(ValueError, RuntimeError, ll.CancelBatchException, ll.CancelEpochException):
        learn.fit(1, cbs=cbs)


def held(learn):
    """What a process holds, beside memory."""
    n_files = len(list(OPEN_FILES.iterdir())) if OPEN_FILES.is_dir() else None
    return {
        "open files": n_files,
        "threads": threading.active_count(),
        "hooks": hooks(learn),
        "callbacks": [*learn.cbs],
    }


def broad_learner(path):
    return toy_learner(n_train=16, n_valid=8, cbs=[made(name) for name in BROAD], path=path)


def in_many_fits(n, learn, warm_up):
    """What is held after the warm-up and at the end, and by how many KiB the memory of Python has grown meanwhile."""
    for i in range(warm_up):
        fit(learn, i)
    gc.collect()
    before = held(learn)
    tracemalloc.start()
    try:
        fit(learn, 0)
        gc.collect()
        start = tracemalloc.get_traced_memory()[0]
        for i in range(warm_up, n):
            fit(learn, i)
        fit(learn, 0)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()
    return before, held(learn), grown / 1024


@pytest.fixture
def quiet(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_forty_fits_leave_nothing_behind(quiet):
    before, after, grown = in_many_fits(40, broad_learner(quiet), warm_up=14)
    assert after == before
    assert grown < A_LITTLE


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_gathers_from_fit_to_fit_would_show(quiet):
    gathering = ll.Callback(after_fit=lambda cb, kept=[]: kept.append(bytes(16 * 1024)))
    learn = toy_learner(n_train=16, n_valid=8, cbs=gathering)
    assert in_many_fits(24, learn, warm_up=7)[2] > A_LITTLE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_five_hundred_fits_leave_nothing_behind_and_the_process_does_not_grow(quiet):
    in_many_fits(60, broad_learner(quiet), warm_up=30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, after, grown = in_many_fits(500, broad_learner(quiet), warm_up=30)
    grown_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak  # KiB on Linux
    print(f"Python's memory grew by {grown:.0f} KiB, the process by {grown_process} KiB; {before}")
    assert after == before
    assert grown < A_LITTLE
    assert os.name != "posix" or grown_process < 32 * 1024
