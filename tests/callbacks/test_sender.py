"""The thread that sends: what it tries again, how long one waits for it, and what it says of a failure."""

import socket
import time
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest

from learnloop.callbacks.sender import QUEUED, Sender, is_worth_another_try, reason_of
from tests.callbacks.servers import serving


def http_error(code):
    return HTTPError("http://s3cret", code, "no", None, None)


@pytest.mark.parametrize(
    ("error", "reason", "again"),
    [
        (http_error(500), "HTTP 500", True),
        (http_error(429), "HTTP 429", True),
        (http_error(403), "HTTP 403", False),
        (URLError(ConnectionRefusedError(111, "refused")), "ConnectionRefusedError 111", True),
        (URLError(socket.gaierror(-2, "s3cret")), "gaierror -2", True),
        (TimeoutError("timed out"), "TimeoutError", True),
        (URLError("unknown url type: s3cret"), "URLError", True),
        (ValueError("s3cret"), "ValueError", False),
    ],
)
def test_reasons_hold_no_address_and_say_what_is_tried_again(error, reason, again):
    assert (reason_of(error), is_worth_another_try(error)) == (reason, again)


def post(url, text="x"):
    return lambda: Request(url, f'{{"text": "{text}"}}'.encode(), method="POST")


def test_messages_arrive_in_their_order():
    with serving() as server:
        sender = Sender(1.0, 0, 0.01)
        for i in range(20):
            sender.put(post(server.url, i))
        sender.close(5.0)
    assert server.texts == [str(i) for i in range(20)] and sender.n_failed == 0


def test_pauses_double():
    with serving([503, 503, 503]) as server:
        sender = Sender(1.0, 3, 0.05)
        began = time.perf_counter()
        sender.put(post(server.url))
        sender.close(5.0)
    assert len(server.received) == 4
    assert 0.35 <= time.perf_counter() - began < 2.0


def test_a_pause_beyond_the_end_is_not_waited_for():
    with serving([503]) as server:
        sender = Sender(1.0, 3, 30.0)
        sender.put(post(server.url))
        began = time.perf_counter()
        sender.close(0.5)
    assert time.perf_counter() - began < 1.0
    assert (sender.n_failed, sender.reason) == (1, "HTTP 503")


def test_too_many_messages_are_dropped_and_putting_never_waits():
    with serving(delay=5.0) as server:
        sender = Sender(0.2, 0, 0.01)
        began = time.perf_counter()
        for _ in range(QUEUED + 50):
            sender.put(post(server.url))
        assert time.perf_counter() - began < 0.2
        sender.close(0.0)
    assert sender.n_failed == QUEUED + 50


def test_one_that_was_closed_sends_again_once_it_is_opened():
    with serving() as server:
        sender = Sender(1.0, 0, 0.01)
        for _ in range(2):
            sender.open()
            sender.put(post(server.url))
            sender.close(2.0)
    assert len(server.received) == 2
