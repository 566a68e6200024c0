"""A thread that sends requests, so that nobody waits for a server."""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

QUEUED = 100  # messages that wait at most; more are dropped


class Sender:
    """Sends requests one after the other in a thread of its own: `put` never waits, `close` for a bounded time.

    One that fails is tried again after `pause` seconds, then twice that; not where the server says that the request is
    wrong (4xx but 429). The thread is a daemon and ends with the last request. Requests are made by functions, in the
    thread, and kept nowhere: they hold secrets.
    """

    def __init__(self, timeout: float, retries: int, pause: float):
        self.timeout, self.retries, self.pause = timeout, retries, pause
        self.n_failed = 0  # messages that did not arrive
        self.reason = ""  # why the last of them did not: a class and a number, never the address
        self._waiting: queue.Queue[Callable[[], Request]] = queue.Queue(QUEUED)
        self._deadline = float("inf")  # monotonic time after which nothing is tried any more
        self._wake = threading.Event()  # set: do not pause any longer
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_working = False  # the thread has not left the queue yet
        self._process = os.getpid()
        self._is_sending = False  # it has a message in hand

    def open(self) -> None:
        """Begins to count and to try anew. A request of before, whose server still hangs, keeps the thread."""
        if self._process != os.getpid():  # the thread, and whoever had the lock, stayed in the other one
            self.__init__(self.timeout, self.retries, self.pause)  # type: ignore[misc]
        self.n_failed, self.reason, self._deadline = 0, "", float("inf")
        self._wake.clear()

    def put(self, make_request: Callable[[], Request]) -> None:
        """Hands over a message; where too many wait, it is dropped."""
        try:
            self._waiting.put_nowait(make_request)
        except queue.Full:
            self.n_failed, self.reason = self.n_failed + 1, f"{QUEUED} others were waiting"
            return
        with self._lock:
            if not self._is_working:
                self._is_working = True
                self._thread = threading.Thread(target=self._work, name="learnloop-notify", daemon=True)
                self._thread.start()

    def close(self, wait: float) -> None:
        """Waits until everything is sent, `wait` seconds at most; what is left then counts as failed and is dropped."""
        self._deadline = time.monotonic() + wait
        thread = self._thread
        if thread is not None:
            thread.join(wait)
        with self._lock:
            self._wake.set()
            n_left = self._drop() + self._is_sending
        if n_left:
            self.n_failed, self.reason = self.n_failed + n_left, self.reason or "no answer in time"

    def _drop(self) -> int:
        n_left = 0
        while True:
            try:
                self._waiting.get_nowait()
            except queue.Empty:
                return n_left
            n_left += 1

    def _work(self) -> None:
        while True:
            with self._lock:  # `put` must not hand over to a thread that is just leaving
                try:
                    make_request = self._waiting.get_nowait()
                except queue.Empty:
                    self._is_working = False
                    return
                self._is_sending = True
            arrived = self._deliver(make_request)
            with self._lock:
                self._is_sending = False
                if not arrived and not self._wake.is_set():  # else it was counted when the sender was closed
                    self.n_failed += 1

    def _deliver(self, make_request: Callable[[], Request]) -> bool:
        """Tries until it arrives, or is not worth another try."""
        for attempt in range(self.retries + 1):
            try:
                _send(make_request(), self.timeout)
                return True
            except Exception as error:
                self.reason = reason_of(error)
                if not is_worth_another_try(error):
                    return False
            pause = self.pause * 2**attempt
            if attempt == self.retries or self._wake.is_set() or time.monotonic() + pause > self._deadline:
                return False
            self._wake.wait(pause)
        return False


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is a failure: the token would go to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _send(request: Request, timeout: float) -> None:
    with build_opener(_NoRedirect).open(request, timeout=timeout):
        pass


def reason_of(error: Exception) -> str:
    """What went wrong, without the address, which texts of errors may repeat."""
    if isinstance(error, HTTPError):
        return f"HTTP {error.code}"
    reason = getattr(error, "reason", None)
    number = getattr(reason, "errno", None) or getattr(error, "errno", None)
    name = type(reason if isinstance(reason, Exception) else error).__name__
    return f"{name} {number}" if number else name


def is_worth_another_try(error: Exception) -> bool:
    """Not where the server says that the request is wrong, nor where there is no request."""
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code == 429
    return isinstance(error, OSError)
