"""Ctrl-C as a stop button: the first one is kept until the next batch boundary, the second raises at once."""

import multiprocessing.queues
import os
import queue
import signal
import sys
import threading
from types import CodeType, FrameType
from typing import Any

from torch.utils.data import DataLoader

#: Functions that a second Ctrl-C must not cut. Beside our own, those of the standard library and of torch that take a
#: lock or start processes: cut inside, they leave what nobody can close any more, and ending the workers waits forever.
_UNCUT: set[CodeType] = {f.__code__ for f in (multiprocessing.queues.Queue.put, DataLoader._get_iterator)}

#: The same, but not for what they call.
_UNCUT_ON_TOP: set[CodeType] = {
    f.__code__ for f in (threading.Condition.__enter__, multiprocessing.queues.Queue.get, queue.Queue.get)
}


def uncut(function: Any) -> Any:
    """Marks a function that a second Ctrl-C waits for: it is raised at the end of the next cleanup."""
    _UNCUT.add(function.__code__)
    return function


def uncut_on_top(function: Any) -> Any:
    """Marks a function whose own few instructions a second Ctrl-C waits for, but not what they call."""
    _UNCUT_ON_TOP.add(function.__code__)
    return function


class StopButton:
    """Replaces python's own SIGINT handler during a fit in the main thread, and puts it back in any case.

    Where a program has a handler of its own, or in another thread, it does nothing.
    """

    def __init__(self, learn: Any, at_once: bool = False):
        self.learn = learn
        self.at_once = at_once  # the first Ctrl-C raises like the second one of a fit: cleanups and undoing are not cut
        self.former: Any = None  # the handler to put back; None where ours is not installed
        self.process = os.getpid()
        self.was_pressed = False  # known once the fit has ended

    @uncut
    def __enter__(self) -> "StopButton":
        self.learn.interrupted = self.at_once and self.learn.interrupted
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self.former = signal.signal(signal.SIGINT, self._pressed)
        return self

    @uncut
    def __exit__(self, *exc: object) -> None:
        learn = self.learn
        if self.former is not None:
            signal.signal(signal.SIGINT, self.former)
        self.was_pressed = learn._stop_requested
        late = cut_short(learn) if learn._stop_late else None  # pressed when no cleanup was left that could raise it
        learn._stop_requested = learn._stop_late = False  # the next run begins without
        if late is not None and self.at_once:
            raise late

    def _pressed(self, signum: int, frame: FrameType | None) -> None:
        learn = self.learn
        if os.getpid() != self.process:
            return  # a data worker that is just being forked: stopping is up to the process that trains
        if not learn._stop_requested and not self.at_once:
            learn._stop_requested = True
        elif _must_wait(frame):
            learn._stop_late = True
        else:
            raise cut_short(learn)


class Sigterm:
    """SIGTERM, by which clusters announce that they take the machine away: it stops a fit as the first Ctrl-C does.

    Only in the main thread, as python has it. The former handler is put back by `close`.
    """

    def __init__(self, learn: Any):
        self.learn = learn
        self.was_sent = False
        self.former: Any = None  # the handler to put back; None where ours is not installed
        self.process = os.getpid()

    @uncut
    def open(self) -> "Sigterm":
        is_ours = threading.current_thread() is threading.main_thread()
        if is_ours and signal.getsignal(signal.SIGTERM) is not None:  # None: one that python could not put back
            self.former = signal.signal(signal.SIGTERM, self._sent)
        return self

    @uncut
    def close(self) -> None:
        if self.former is not None:
            signal.signal(signal.SIGTERM, self.former)
            self.former = None

    def _sent(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker, which inherited this handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.was_sent = self.learn._stop_requested = True


def cut_short(learn: Any) -> KeyboardInterrupt:
    """What a second Ctrl-C raises: somewhere inside a batch there is no state to go on from exactly."""
    learn._stop_late = False
    if not learn._stop_requested:  # it was the first one, of a run that is undone
        return KeyboardInterrupt()
    learn._point = None
    return KeyboardInterrupt("a second Ctrl-C cut the fit where it was, so it cannot go on exactly: fit again.")


def _must_wait(frame: FrameType | None) -> bool:
    """Whether a cleanup is running, or what else must not be cut."""
    if frame is not None and frame.f_code in _UNCUT_ON_TOP:
        return True
    while frame is not None:
        if frame.f_code in _UNCUT:
            return True
        frame = frame.f_back
    return False


def stopped(where: str, then: str) -> KeyboardInterrupt:
    """An exact KeyboardInterrupt, not a subclass, which would exit with 1; a notebook shows it as one line."""
    interrupt = KeyboardInterrupt(f"stopped {where}. {then}")
    interrupt._render_traceback_ = lambda: [f"KeyboardInterrupt: {interrupt}"]  # type: ignore[attr-defined]
    return interrupt


def in_notebook() -> bool:
    """Whether an IPython kernel shows our output."""
    shell = sys.modules.get("IPython")
    instance = shell.get_ipython() if shell is not None and hasattr(shell, "get_ipython") else None
    return type(instance).__name__ == "ZMQInteractiveShell"
