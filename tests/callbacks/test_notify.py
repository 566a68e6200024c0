"""Notify: what is said and when, against a server that answers, fails, hangs or is not there."""

import copy
import logging
import pickle
import signal
import threading
import time

import pytest
import torch

import learnloop as ll
from learnloop.callbacks.notify import clock, is_better, short
from learnloop.callbacks.services import Webhook
from learnloop.testing import check_callback, toy_learner
from tests.callbacks.servers import serving
from tests.toys import Once, raising

SECRET = "s3cr3t-t0k3n"
QUICK = {"pause": 0.01, "timeout": 0.5, "wait": 5.0}


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WEBHOOK_URL", f"{server.url}/{SECRET}")
        yield server


def fit(n_epoch=1, cbs=None, **kwargs):
    learn = toy_learner(n_train=16, n_valid=8, cbs=ll.Notify(name="toy", **{**QUICK, **kwargs}))
    learn.fit(n_epoch, cbs=cbs)
    return learn


# What is said


def test_start_and_end_are_said(server):
    fit(2)
    assert server.texts == [
        "toy: training begins, 2 epochs",
        "toy: training has ended after 0:00:00: train_loss 1.663, valid_loss 0.8933",
    ]


def test_every_so_many_epochs_and_each_new_best_are_said(server):
    fit(3, every=2, on=("best",))
    assert server.texts == [
        "toy: best valid_loss so far is 1.187, in epoch 0",
        "toy: best valid_loss so far is 0.8933, in epoch 1",
        "toy: 2 of 3 epochs done: train_loss 1.663, valid_loss 0.8933",
        "toy: best valid_loss so far is 0.6502, in epoch 2",
    ]


def test_an_error_is_said_and_stays_the_users(server):
    with pytest.raises(ZeroDivisionError, match="by hand"):
        fit(2, cbs=Once("after_loss", raising(ZeroDivisionError("by hand"))))
    assert server.texts[1:] == ["toy: training failed in epoch 0 after 0:00:00: ZeroDivisionError: by hand"]


def test_an_interrupt_is_said(server):
    with pytest.raises(KeyboardInterrupt):
        fit(2, cbs=Once("after_loss", lambda cb: signal.raise_signal(signal.SIGINT)))
    assert server.texts[1:] == ["toy: training was interrupted in epoch 0 after 0:00:00"]


def test_a_fit_that_a_callback_cancels_has_ended(server):
    fit(2, cbs=Once("after_epoch", raising(ll.CancelFitException())), on="end")
    assert server.texts == ["toy: training has ended after 0:00:00: no row yet"]


def test_an_exception_that_was_being_handled_before_the_fit_is_none_of_it(server):
    try:
        raise KeyError("earlier")
    except KeyError:
        fit(on=("end", "error"))
    assert [text.split(":")[1] for text in server.texts] == [" training has ended after 0"]


def test_other_runs_say_nothing(server):
    learn = toy_learner(cbs=ll.Notify())
    learn.validate()
    learn.get_preds()
    learn.lr_find(show_plot=False)
    assert server.received == []


def test_one_that_is_removed_in_a_fit_says_no_end(server):
    notify = ll.Notify(name="toy", **QUICK)
    toy_learner(cbs=notify).fit(1, cbs=Once("before_validate", lambda cb: cb.learn.remove_cb(notify)))
    assert server.texts == ["toy: training begins, 1 epochs"]


def test_templates_are_the_users(server):
    fit(template={"end": "{event} of {name}: {n_done}/{n_epoch}, {step:03d} batches"})
    assert server.texts == ["toy: training begins, 1 epochs", "end of toy: 1/1, 002 batches"]
    server.received.clear()
    fit(template="{event}")
    assert server.texts == ["start", "end"]


def test_the_webhook_gets_the_fields_beside_the_text(server):
    fit(on="end")
    path, headers, body = server.received[0]
    assert path == f"/{SECRET}" and headers["Content-Type"] == "application/json"
    assert body == {
        "text": "toy: training has ended after 0:00:00: train_loss 2.106, valid_loss 1.187",
        "event": "end",
        "name": "toy",
        "epoch": 0,
        "n_done": 1,
        "n_epoch": 1,
        "step": 2,
        "row": "train_loss 2.106, valid_loss 1.187",
        "monitor": "valid_loss",
        "value": "1.187",
        "best": "1.187",
        "time": "0:00:00",
        "error": "",
    }


# What is refused before a training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"service": "https://hooks.example/" + SECRET}, "`service` is none that is known; there are webhook, slack"),
        ({"on": ("start", "finish")}, "`on` names 'finish'; there are start, epoch, best, end, error, interrupt"),
        ({"every": 0}, "`every=0`: pass a number of epochs"),
        ({"template": "{lr}"}, r"the template names \{lr\}; the fields are event, name"),
        ({"template": {"end": "{epoch.__class__}"}}, r"the template names \{epoch.__class__\}"),
        ({"template": {"done": "x"}}, "`on` names 'done'"),
        ({"template": "{best:.3f}"}, "Unknown format code"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        ll.Notify(**arguments)
    assert SECRET not in str(raised.value)


def test_a_column_that_is_not_recorded_is_refused_before_the_first_batch(server):
    with pytest.raises(ValueError, match="`Notify` monitors `accuracy`, but this fit records train_loss, valid_loss"):
        fit(on="best", monitor="accuracy")


def test_where_the_address_is_not_set_the_training_goes_on_and_the_log_says_so(caplog, monkeypatch):
    monkeypatch.delenv("WEBHOOK_URL", raising=False)
    assert len(fit(2).recorder.values) == 2
    assert caplog.messages == ["Notify sends nothing: WEBHOOK_URL must be set in the environment."]


# A server that does not do as it should


def test_a_server_that_fails_is_asked_again(server):
    server.answers = [500, 429]
    fit(on="start")
    assert server.texts == ["toy: training begins, 1 epochs"] * 3


def test_a_request_that_is_wrong_is_not_sent_again(server, caplog):
    server.answers = [404]
    fit(on="start")
    assert len(server.received) == 1
    assert caplog.messages == ["Notify: 1 messages to Webhook did not arrive (HTTP 404)."]


def test_a_redirect_is_not_followed(server, caplog):
    server.answers = [302]
    fit(on="start")
    assert [path for path, _, _ in server.received] == [f"/{SECRET}"]
    assert caplog.messages == ["Notify: 1 messages to Webhook did not arrive (HTTP 302)."]


def test_a_server_that_is_not_there_ends_no_training(monkeypatch, caplog):
    with serving() as gone:
        pass
    monkeypatch.setenv("WEBHOOK_URL", gone.url)
    assert len(fit(2).recorder.values) == 2
    assert len(caplog.messages) == 1 and "2 messages to Webhook did not arrive (ConnectionRefusedError" in caplog.text


def test_an_address_of_a_file_is_not_opened(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("WEBHOOK_URL", f"file://{tmp_path}/{SECRET}")
    fit(on="start")
    assert caplog.messages == ["Notify: 1 messages to Webhook did not arrive (ValueError)."]


def test_a_server_that_hangs_delays_the_end_by_the_wait_and_costs_the_batches_nothing(monkeypatch, caplog):
    with serving(delay=30.0) as hangs:
        monkeypatch.setenv("WEBHOOK_URL", hangs.url)
        began = time.perf_counter()
        fit(3, every=1, timeout=30.0, wait=0.2)
        took = time.perf_counter() - began
    assert 0.2 <= took < 1.5
    assert caplog.messages == ["Notify: 5 messages to Webhook did not arrive (no answer in time)."]


def test_fit_after_fit_with_a_server_that_hangs_has_one_thread(monkeypatch):
    def senders():
        return [t for t in threading.enumerate() if t.name == "learnloop-notify" and t not in before]

    before = threading.enumerate()
    with serving(delay=30.0) as hangs:
        monkeypatch.setenv("WEBHOOK_URL", hangs.url)
        learn = toy_learner(cbs=ll.Notify(timeout=2.0, wait=0.01, retries=0))
        for _ in range(5):
            learn.fit(1)
        assert len(senders()) == 1
        for thread in senders():
            thread.join(5)
        assert senders() == []


def test_the_thread_is_gone_when_everything_was_sent(server):
    before = threading.enumerate()
    fit()
    assert [t for t in threading.enumerate() if t.name == "learnloop-notify" and t not in before] == []


# Secrets


def test_the_secret_is_in_no_text_state_or_copy(server, caplog):
    caplog.set_level(logging.DEBUG)
    server.answers = [500] * 10
    seen, pickled = [], []

    def look(cb):
        notify = cb.learn.notify
        alone = copy.copy(notify)
        object.__setattr__(alone, "learn", None)
        pickled.append(pickle.dumps(alone))
        seen.extend([repr(notify), repr(vars(notify)), repr(cb.learn.state_dict()["callbacks"])])
        seen.append(repr(vars(notify._sender)) + repr(notify.service) + repr(vars(copy.copy(notify))))

    learn = toy_learner(cbs=ll.Notify(retries=1, **QUICK))
    learn.fit(1, cbs=Once("after_loss", look))
    assert len(seen) == 4 and len(server.received) > 0
    assert SECRET not in "".join([*seen, caplog.text])
    assert SECRET.encode() not in b"".join(pickled)
    assert pickle.loads(pickled[0])._sender is None


def test_an_error_in_the_training_does_not_carry_it(server):
    with pytest.raises(ZeroDivisionError) as raised:
        fit(cbs=Once("after_loss", raising(ZeroDivisionError("by hand"))))
    notes = "".join(getattr(raised.value, "__notes__", []))
    frames, frame = [], raised.tb
    while frame is not None:
        frames.append(repr(frame.tb_frame.f_locals))
        frame = frame.tb_next
    assert SECRET not in notes + str(raised.value) + "".join(frames[1:])


# Decisions


def test_better_is_smaller_for_losses_and_errors_and_larger_for_the_rest():
    assert is_better(0.1, 0.2, "valid_loss") and is_better(0.1, 0.2, "error_rate") and is_better(0.3, 0.2, "accuracy")
    assert not is_better(0.2, 0.2, "valid_loss") and not is_better(float("nan"), None, "accuracy")
    assert is_better(0.1, None, "valid_loss") and not is_better(None, 0.2, "valid_loss")


def test_numbers_and_times_are_short():
    assert [short(0.123456), short(3), short(None), short("x")] == ["0.1235", "3", "-", "x"]
    assert [clock(0.9), clock(83), clock(3723.5)] == ["0:00:00", "0:01:23", "1:02:03"]


def test_the_best_value_survives_a_resume(server):
    notify = ll.Notify(on="best", name="toy", **QUICK)
    learn = toy_learner(n_train=16, n_valid=8, cbs=notify)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=Once("before_validate", lambda cb: signal.raise_signal(signal.SIGINT)))
    learn.resume()
    assert notify.best == min(row["valid_loss"] for row in learn.recorder.history)
    assert len([text for text in server.texts if "best" in text]) == 3


def test_it_leaves_weights_and_random_states_alone(server):
    def outcome(*cbs):
        torch.manual_seed(0)
        learn = toy_learner(n_train=16, n_valid=8, cbs=cbs)
        learn.fit(2)
        return [p.tolist() for p in learn.model.parameters()], torch.get_rng_state().tolist()

    assert ll.Notify.reads_only
    assert outcome(ll.Notify(every=1, on="best", **QUICK)) == outcome()


def test_it_keeps_the_promises(server):
    make = lambda: ll.Notify(Webhook(), every=1, on=("start", "best", "end", "error", "interrupt"), **QUICK)  # noqa: E731
    assert check_callback(make, events=("before_fit", "after_loss", "before_validate", "after_epoch")).broken == {}
