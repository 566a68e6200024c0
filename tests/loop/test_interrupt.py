"""Ctrl-C during a fit: where it stops, what still runs, what leaves, and who is left alone."""

import multiprocessing
import multiprocessing.queues
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from learnloop import Callback, CancelFitException, DataLoaders
from learnloop.loop.interrupt import Sigterm, StopButton, in_notebook, uncut_on_top
from tests.toys import Heard, Once, learner, loaders, raise_at, raising, tensor_loader

ROOT = Path(__file__).parents[2]


def press(cb=None):
    signal.raise_signal(signal.SIGINT)


def press_twice(cb=None):
    press()
    press()


def press_at(event_name, training=None, times=1):
    """A callback that presses Ctrl-C the first time that an event fires."""
    return Once(event_name, press if times == 1 else press_twice, training)


def stopped(learn, *args, **kwargs):
    """The interrupt that leaves a fit."""
    with pytest.raises(KeyboardInterrupt) as caught:
        learn.fit(*args, **kwargs)
    return caught.value


def heard_from(event_name, log):
    return log.events[log.events.index(event_name) :]


@pytest.fixture(autouse=True)
def pythons_own_handler():
    """Every test begins and ends with it: no fit may leave another one."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Where the first one stops


def test_the_first_ctrl_c_lets_the_batch_finish_and_then_ends_the_fit_in_order():
    log = Heard()
    stopped(learner([log, press_at("after_pred")]), 2)
    assert heard_from("after_pred", log) == [
        "after_pred",
        "after_loss",
        "before_backward",
        "after_backward",
        "cleanup_backward",
        "before_step",
        "after_step",
        "cleanup_step",
        "after_batch",
        "cleanup_batch",
        "cleanup_train",
        "cleanup_epoch",
        "after_cancel_fit",
        "after_fit",
        "cleanup_fit",
    ]


def test_ctrl_c_between_two_phases_stops_where_the_next_span_would_begin():
    log = Heard()
    stopped(learner([log, press_at("after_train")]), 2)
    assert heard_from("after_train", log) == [
        "after_train",
        "cleanup_train",
        "cleanup_epoch",
        "after_cancel_fit",
        "after_fit",
        "cleanup_fit",
    ]


def test_ctrl_c_in_a_validation_batch_stops_after_that_batch():
    log = Heard()
    stopped(learner([log, press_at("after_pred", training=False)], loaders(2, 3)), 1)
    assert heard_from("before_validate", log) == [
        "before_validate",
        "before_batch",
        "after_pred",
        "after_loss",
        "after_batch",
        "cleanup_batch",
        "cleanup_validate",
        "cleanup_epoch",
        "after_cancel_fit",
        "after_fit",
        "cleanup_fit",
    ]


def test_ctrl_c_in_before_fit_ends_the_fit_before_its_first_epoch():
    log = Heard()
    stopped(learner([log, press_at("before_fit")]), 1)
    assert log.events == ["after_create", "before_fit", "after_cancel_fit", "after_fit", "cleanup_fit"]


def test_ctrl_c_in_the_last_after_epoch_still_ends_the_fit_as_cancelled():
    log = Heard()
    stopped(learner([log, press_at("after_epoch")]), 1)
    assert log.events[-5:] == ["after_epoch", "cleanup_epoch", "after_cancel_fit", "after_fit", "cleanup_fit"]


@pytest.mark.parametrize("event_name", ["after_fit", "cleanup_fit"])
def test_ctrl_c_when_the_fit_is_ending_already_leaves_after_its_last_cleanup(event_name):
    log = Heard()
    learn = learner([log, press_at(event_name)])
    interrupt = stopped(learn, 1)
    assert log.events[-3:] == ["cleanup_epoch", "after_fit", "cleanup_fit"]
    assert str(interrupt) == "stopped when the fit was ending already. There is nothing left to go on with."


def test_ctrl_c_in_a_fit_that_a_callback_cancels_leaves_as_an_interrupt():
    cancel = Callback(after_pred=lambda cb: (press(), raising(CancelFitException)(cb)))
    log = Heard()
    stopped(learner([log, cancel]), 1)
    assert heard_from("after_pred", log) == [
        "after_pred",
        "cleanup_batch",
        "cleanup_train",
        "cleanup_epoch",
        "after_cancel_fit",
        "after_fit",
        "cleanup_fit",
    ]


def test_a_fit_by_steps_stops_after_the_batch_too():
    learn = learner(press_at("after_pred"))
    interrupt = stopped(learn, n_step=5)
    assert (learn.opt_iter, str(interrupt)) == (
        1,
        "stopped before batch 1 of epoch 0. `learn.resume()` goes on from there.",
    )


def test_the_button_knows_afterwards_whether_it_was_pressed():
    pressed, left_alone = StopButton(learner()), StopButton(learner())
    assert not pressed.was_pressed
    with pressed:
        press()
    with left_alone:
        pass
    assert pressed.was_pressed and not left_alone.was_pressed


# What leaves


@pytest.mark.parametrize(
    ("event_name", "training", "where"),
    [
        ("before_fit", None, "before epoch 0"),
        ("before_epoch", None, "before epoch 0"),
        ("before_train", None, "before batch 0 of epoch 0"),
        ("before_batch", None, "before batch 1 of epoch 0"),
        ("after_train", None, "in the validation of epoch 0"),
        ("after_batch", False, "in the validation of epoch 0"),
        ("after_epoch", None, "before epoch 1"),
    ],
)
def test_the_interrupt_says_where_the_fit_stopped(event_name, training, where):
    interrupt = stopped(learner(press_at(event_name, training)), 2)
    assert str(interrupt) == f"stopped {where}. `learn.resume()` goes on from there."


def test_what_leaves_is_a_keyboard_interrupt_and_no_subclass():
    assert type(stopped(learner(press_at("after_batch")), 1)) is KeyboardInterrupt


def test_a_notebook_shows_the_interrupt_as_one_line():
    interrupt = stopped(learner(press_at("after_batch")), 1)
    assert interrupt._render_traceback_() == [
        "KeyboardInterrupt: stopped before batch 1 of epoch 0. `learn.resume()` goes on from there."
    ]


def test_the_interrupt_carries_no_cause_from_inside_the_fit():
    interrupt = stopped(learner(press_at("after_batch")), 1)
    assert (interrupt.__cause__, interrupt.__context__) == (None, None)


def test_callbacks_see_at_the_end_that_the_fit_was_interrupted():
    seen = []
    note = Callback(
        **{name: lambda cb: seen.append(cb.interrupted) for name in ("after_cancel_fit", "after_fit", "cleanup_fit")}
    )
    stopped(learner([note, press_at("after_batch")]), 1)
    assert seen == [True, True, True]


def test_the_fit_after_an_interrupted_one_is_not_interrupted():
    seen = []
    learn = learner([press_at("after_batch"), Callback(after_fit=lambda cb: seen.append(cb.interrupted))])
    stopped(learn, 1)
    learn.fit(1)
    assert seen == [True, False]


def test_an_error_after_ctrl_c_leaves_as_it_is():
    learn = learner([press_at("before_batch"), raise_at("after_pred", ValueError("mine"))])
    with pytest.raises(ValueError, match="mine"):
        learn.fit(1)


def test_an_error_after_ctrl_c_does_not_stop_what_comes_next():
    learn = learner([press_at("before_batch"), raise_at("after_pred", ValueError("mine"))])
    with pytest.raises(ValueError, match="mine"):
        learn.fit(1)
    learn.validate()
    learn.fit(1)


class Breaks:
    """A loader that presses Ctrl-C and fails on the way to its second batch, as one does whose workers were stopped."""

    def __init__(self, pressing=True):
        self.pressing = pressing

    def __iter__(self):
        yield from tensor_loader(1)
        if self.pressing:
            press()
        raise RuntimeError("worker exited unexpectedly")


def test_a_loader_error_after_ctrl_c_counts_as_the_interrupt():
    learn = learner(dls=DataLoaders(Breaks(), device="cpu"))
    assert str(stopped(learn, 1)) == "stopped before batch 1 of epoch 0. `learn.resume()` goes on from there."


def test_a_loader_error_in_a_validation_after_ctrl_c_counts_as_the_interrupt():
    learn = learner(dls=DataLoaders(tensor_loader(2), Breaks(), device="cpu"))
    assert str(stopped(learn, 1)) == "stopped in the validation of epoch 0. `learn.resume()` goes on from there."


def test_a_loader_error_without_ctrl_c_is_an_error():
    with pytest.raises(RuntimeError, match="worker exited"):
        learner(dls=DataLoaders(Breaks(pressing=False), device="cpu")).fit(1)


def test_a_state_that_cannot_be_taken_does_not_replace_the_interrupt():
    class Growing(Callback):
        _stateattrs = ("kept",)

        def __init__(self):
            self.kept = None

        def after_batch(self):
            self.kept = {1, 2}

    learn = learner([Growing(), press_at("after_batch")])
    assert str(stopped(learn, 1)).startswith(
        "stopped before batch 1 of epoch 0. It cannot go on exactly from there, because `Growing.kept` is a set"
    )
    with pytest.raises(RuntimeError, match="there is nothing to resume"):
        learn.resume()


# The second one


def test_the_second_ctrl_c_raises_at_once_and_fires_cleanups_only():
    log = Heard()
    stopped(learner([log, press_at("after_pred", times=2)]), 2)
    assert heard_from("after_pred", log) == [
        "after_pred",
        "cleanup_batch",
        "cleanup_train",
        "cleanup_epoch",
        "cleanup_fit",
    ]


def test_the_second_ctrl_c_leaves_as_an_exact_keyboard_interrupt_that_says_what_is_lost():
    interrupt = stopped(learner(press_at("after_pred", times=2)), 2)
    assert type(interrupt) is KeyboardInterrupt
    assert str(interrupt) == "a second Ctrl-C cut the fit where it was, so it cannot go on exactly: fit again."


def test_after_the_second_ctrl_c_the_learner_says_that_it_cannot_resume():
    learn = learner(press_at("after_pred", times=2))
    stopped(learn, 2)
    with pytest.raises(RuntimeError, match=r"nothing to resume.* a second Ctrl-C cut it inside a batch"):
        learn.resume()


def test_a_second_ctrl_c_at_the_end_takes_the_state_back():
    learn = learner([press_at("after_batch"), press_at("after_fit")])
    stopped(learn, 2)
    with pytest.raises(RuntimeError, match="nothing to resume"):
        learn.resume()


def test_the_second_ctrl_c_in_a_cleanup_waits_until_all_cleanups_of_the_span_have_run():
    done = []

    class First(Callback):
        order = 1  # cleanups run in reverse

        def cleanup_batch(self):
            press_twice()
            done.append("after the second press")

    class Second(Callback):
        def cleanup_batch(self):
            done.append("the other cleanup")

    log = Heard()
    interrupt = stopped(learner([log, First(), Second()]), 2)
    assert done == ["after the second press", "the other cleanup"]
    assert log.events[-4:] == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]
    assert "second Ctrl-C" in str(interrupt)
    assert not hasattr(interrupt, "__notes__")  # the spans around it raise no other one


def test_the_second_ctrl_c_in_the_last_cleanup_waits_for_it_and_takes_the_state_back():
    log = Heard()
    learn = learner([log, press_at("after_batch"), press_at("cleanup_fit")])
    interrupt = stopped(learn, 2)
    assert log.events[-3:] == ["after_cancel_fit", "after_fit", "cleanup_fit"]
    assert "second Ctrl-C" in str(interrupt)
    with pytest.raises(RuntimeError, match="nothing to resume"):
        learn.resume()


@uncut_on_top
def press_unasked():
    signal.raise_signal(signal.SIGINT)


@uncut_on_top
def ask_to_press():
    press()


@pytest.mark.parametrize(("second", "goes_on"), [(press_unasked, True), (ask_to_press, False), (press, False)])
def test_the_second_ctrl_c_waits_for_a_marked_functions_own_instructions_and_for_nothing_it_calls(second, goes_on):
    heard = []

    def twice(cb):
        press()
        second()
        heard.append("went on")

    stopped(learner(Once("before_batch", twice)), 1)
    assert bool(heard) == goes_on


def test_a_button_that_acts_at_once_raises_the_first_ctrl_c_where_it_may_and_else_at_its_end():
    learn, done = learner(), []
    with StopButton(learn, at_once=True):
        done.append("nothing pressed")
    with pytest.raises(KeyboardInterrupt), StopButton(learn, at_once=True):
        press()
        done.append("never")
    with pytest.raises(KeyboardInterrupt), StopButton(learn, at_once=True):
        press_unasked()
        done.append("waited")
    assert done == ["nothing pressed", "waited"] and not learn.interrupted


def test_a_cleanup_that_runs_because_of_the_second_ctrl_c_is_not_cut_by_a_third():
    done = []

    class Slow(Callback):
        def cleanup_batch(self):
            press()
            done.append("whole")

    stopped(learner([Slow(), press_at("after_pred", times=2)]), 2)
    assert done == ["whole"]


def test_a_keyboard_interrupt_raised_by_a_handler_fires_cleanups_only():
    log = Heard()
    interrupt = stopped(learner([log, raise_at("after_loss", KeyboardInterrupt("mine"))]), 2)
    assert str(interrupt) == "mine"
    assert log.events[-4:] == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]


@pytest.mark.parametrize("times", [1, 2])
def test_the_learner_can_be_used_after_it(times):
    learn = learner(press_at("after_pred", times=times))
    stopped(learn, 2)
    learn.validate()
    learn.fit(1)
    assert (learn.task, learn.xb, learn.train_iter) == (None, (None,), 2)


@pytest.mark.parametrize(("moment", "closes_at"), [("taken", "cleanup_fit"), ("given back", "after_fit")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_waits_while_a_signal_is_taken_over_or_given_back(number, moment, closes_at, monkeypatch):
    set_handler, former = signal.signal, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def pressing(which, handler):
        if which == number and moment == "given back" and handler == former[number]:
            press_twice()
        before = set_handler(which, handler)
        if which == number and moment == "taken" and handler != former[number]:
            press_twice()
        return before

    learn = learner()
    sigterm = Sigterm(learn)
    learn.add_cb(Callback(before_fit=lambda cb: sigterm.open(), **{closes_at: lambda cb: sigterm.close()}))
    monkeypatch.setattr(signal, "signal", pressing)
    stopped(learn, 1)
    assert {n: signal.getsignal(n) for n in former} == former


# Who is left alone


def handlers_during(learn, run):
    """The SIGINT handlers that a batch sees in a run."""
    seen = []
    with learn.added_cbs(Callback(after_batch=lambda cb: seen.append(signal.getsignal(signal.SIGINT)))):
        run()
    return set(seen)


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda signum, frame: None])
def test_a_program_with_a_handler_of_its_own_keeps_it(own):
    learn = learner()
    signal.signal(signal.SIGINT, own)
    try:
        assert handlers_during(learn, lambda: learn.fit(1)) == {own}
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_fit_in_another_thread_leaves_the_handler_alone():
    learn, seen = learner(), []
    thread = threading.Thread(target=lambda: seen.append(handlers_during(learn, lambda: learn.fit(1))))
    thread.start()
    thread.join()
    assert seen == [{signal.default_int_handler}]


def test_a_validation_from_outside_leaves_the_handler_alone():
    learn = learner()
    assert handlers_during(learn, learn.validate) == {signal.default_int_handler}


def test_ctrl_c_in_a_validation_from_outside_passes_and_moves_nothing():
    learn = learner(dls=loaders(2, 3))
    learn.fit(1)
    before = (learn.epoch, learn.train_iter, torch.get_rng_state().tolist(), list(learn.cbs))
    with pytest.raises(KeyboardInterrupt):
        learn.validate(cbs=press_at("after_pred"))
    assert (learn.epoch, learn.train_iter, torch.get_rng_state().tolist(), list(learn.cbs)) == before
    assert learn.task is None


def test_a_validation_nested_in_a_fit_is_not_cut():
    losses = []
    nested = Once("after_batch", lambda cb: (press(), losses.append(cb.learn.validate())))
    log = Heard()
    stopped(learner([log, nested], loaders(2, 3)), 1)
    assert len(losses) == 1
    assert log.events.count("before_batch") == 1 + 3  # the training batch, and the whole nested validation


def test_a_fit_of_another_learner_inside_a_fit_is_not_cut():
    inner = learner()
    outer = learner(Once("after_batch", lambda cb: (press(), inner.fit(2))))
    stopped(outer, 1)
    assert (inner.train_iter, outer.train_iter) == (4, 1)


def test_the_handler_is_put_back_after_an_error():
    with pytest.raises(ValueError, match="mine"):
        learner(raise_at("after_pred", ValueError("mine"))).fit(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_touched_by_a_fit_that_is_refused():
    learn = learner(press_at("after_batch"))
    stopped(learn, 1)
    with pytest.raises(ValueError, match="pass 0 or more"):
        learn.fit(-1)
    learn.resume()  # the point was not lost


# What shows the output


class ZMQInteractiveShell:
    """Named like the shell of an IPython kernel."""


class TerminalInteractiveShell:
    """Named like that of a terminal."""


@pytest.mark.parametrize(
    ("shell", "expected"), [(ZMQInteractiveShell(), True), (TerminalInteractiveShell(), False), (None, False)]
)
def test_a_kernel_is_known_by_its_shell(shell, expected, monkeypatch):
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert in_notebook() is expected


def test_without_ipython_or_while_it_is_imported_there_is_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


# From outside of the process


# SIGTERM


@pytest.fixture
def sigterm_of():
    """Makes an open `Sigterm`; it is closed after the test."""
    opened = []
    yield lambda learn: opened.append(Sigterm(learn).open()) or opened[0]
    opened[0].close()


def test_sigterm_stops_a_fit_at_the_end_of_its_batch_and_the_former_handler_comes_back(sigterm_of):
    former, log = signal.getsignal(signal.SIGTERM), Heard(["after_batch", "after_cancel_fit"])
    learn = learner([log, Once("after_pred", lambda cb: signal.raise_signal(signal.SIGTERM))])
    sigterm = sigterm_of(learn)
    assert not sigterm.was_sent
    stopped(learn, 2)
    assert sigterm.was_sent and log.events == ["after_batch", "after_cancel_fit"]
    sigterm.close()
    assert signal.getsignal(signal.SIGTERM) == former


def test_what_is_set_for_sigterm_after_it_was_given_back_stays(sigterm_of):
    former, own = signal.getsignal(signal.SIGTERM), lambda signum, frame: None
    sigterm = sigterm_of(learner())
    sigterm.close()
    signal.signal(signal.SIGTERM, own)
    sigterm.close()
    now = signal.signal(signal.SIGTERM, former)
    assert now is own


def test_a_forked_process_dies_of_sigterm_and_the_fit_goes_on(sigterm_of):
    learn = learner()
    sigterm = sigterm_of(learn)
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    learn.fit(1)
    assert learn.opt_iter == 2 and not sigterm.was_sent


def test_sigterm_is_left_alone_in_another_thread():
    former, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(Sigterm(learner()).open().former))
    thread.start()
    thread.join()
    assert found == [None] and signal.getsignal(signal.SIGTERM) == former


def test_a_script_ends_as_killed_by_ctrl_c_so_that_shell_loops_end_too():
    script = """
import signal
from learnloop import Callback
from tests.toys import learner
learner(Callback(after_batch=lambda cb: signal.raise_signal(signal.SIGINT))).fit(1)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.splitlines()[-1] == (
        "KeyboardInterrupt: stopped before batch 1 of epoch 0. `learn.resume()` goes on from there."
    )


def test_real_signals_at_random_moments_leave_cleanups_learner_and_weights_whole():
    command = [sys.executable, "benchmarks/interrupts.py", "30", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "30 fits hit, 0 problems" in done.stdout.splitlines(), f"{done.returncode}: {done.stdout}{done.stderr}"


@pytest.fixture
def kernel():
    """A running Jupyter kernel, (manager, client), that finds the package."""
    manager = pytest.importorskip("jupyter_client").KernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable
    manager.start_kernel(cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def next_message(client, kind):
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["header"]["msg_type"] == kind:
            return message["content"]


def test_a_notebook_cell_that_is_interrupted_shows_one_line(kernel):
    manager, client = kernel
    client.execute(
        "from learnloop import Callback; from tests.toys import learner\n"
        "learn = learner(Callback(before_train=lambda cb: print('training', flush=True)))\n"
        "learn.fit(1_000_000)"
    )
    assert "training" in next_message(client, "stream")["text"]
    manager.interrupt_kernel()
    shown = next_message(client, "error")
    assert (shown["ename"], len(shown["traceback"])) == ("KeyboardInterrupt", 1)
    assert shown["traceback"][0].startswith("KeyboardInterrupt: stopped ")


def test_the_second_ctrl_c_waits_for_a_lock_of_the_workers_queue_to_be_given_back():
    held = []

    class Queue(multiprocessing.queues.Queue):
        def __init__(self):
            super().__init__(ctx=multiprocessing.get_context())

        def _start_thread(self):  # `put` calls it with the lock in hand
            press_twice()
            held.append("went on")
            super()._start_thread()

    queue = Queue()
    interrupt = stopped(learner(Once("after_pred", lambda cb: queue.put(1))), 1)
    queue.close()
    assert held == ["went on"]
    assert "second Ctrl-C" in str(interrupt)
