"""Spans: before, body, cancel, after, cleanup; for each cancel at each event, and for what is raised in cleanups."""

import signal
import sys
from contextlib import suppress

import pytest

from learnloop import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    DataLoaders,
    TrainEvalCallback,
)
from learnloop.loop import interrupt
from learnloop.loop.events import BATCH_EVENTS, EVENTS
from learnloop.loop.spans import SPANS
from tests.toys import Heard, Once, learner, loaders, raise_at, raising, weights

CANCELS = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "train": CancelTrainException,
    "validate": CancelValidException,
    "batch": CancelBatchException,
    "backward": CancelBackwardException,
    "step": CancelStepException,
}
BACKWARD = ["before_backward", "after_backward", "cleanup_backward"]
STEP = ["before_step", "after_step", "cleanup_step"]
TRAIN_BATCH = ["before_batch", "after_pred", "after_loss", *BACKWARD, *STEP, "after_batch", "cleanup_batch"]
VALID_BATCH = ["before_batch", "after_pred", "after_loss", "after_batch", "cleanup_batch"]
TRAIN = ["before_train", *TRAIN_BATCH, *TRAIN_BATCH, "after_train", "cleanup_train"]
VALIDATE = ["before_validate", *VALID_BATCH, "after_validate", "cleanup_validate"]
EPOCH = ["before_epoch", *TRAIN, *VALIDATE, "after_epoch", "cleanup_epoch"]
FIT_END = ["after_fit", "cleanup_fit"]


def heard_in_fit(*cbs, n_epoch=1, error=None, events=EVENTS, **kwargs):
    """What is heard in a fit of two training batches and one for validation, which `error` leaves."""
    heard = Heard(events)
    learn = learner([heard, *cbs], **kwargs)
    heard.events.clear()
    if error is None:
        learn.fit(n_epoch)
    else:
        with pytest.raises(error):
            learn.fit(n_epoch)
    return heard.events


# A plain fit


def test_a_fit_is_the_picture_of_the_loop():
    assert heard_in_fit(n_epoch=2) == ["before_fit", *EPOCH, *EPOCH, *FIT_END]


def test_a_fit_of_no_epoch_is_only_the_fit_span():
    assert heard_in_fit(n_epoch=0) == ["before_fit", *FIT_END]


def test_a_fit_without_validation_loader_has_no_validate_span():
    assert heard_in_fit(dls=loaders(2, None)) == ["before_fit", "before_epoch", *TRAIN, *EPOCH[-2:], *FIT_END]


def test_the_default_callbacks_change_nothing_in_what_fires(capsys):
    assert heard_in_fit(n_epoch=2, default_cbs=True) == ["before_fit", *EPOCH, *EPOCH, *FIT_END]


# A cancel of a span skips the rest of it


def test_cancel_in_before_batch_skips_the_body():
    events = heard_in_fit(raise_at("before_batch", CancelBatchException))
    batch = ["before_batch", "after_cancel_batch", "after_batch", "cleanup_batch"]
    train = ["before_train", *batch, *TRAIN_BATCH, "after_train", "cleanup_train"]
    assert events == ["before_fit", "before_epoch", *train, *VALIDATE, *EPOCH[-2:], *FIT_END]


def test_cancel_in_the_body_of_a_batch_skips_the_rest_of_it():
    events = heard_in_fit(raise_at("after_loss", CancelBatchException))
    batch = [*TRAIN_BATCH[:3], "after_cancel_batch", "after_batch", "cleanup_batch"]
    assert events[3:10] == [*batch, "before_batch"]


def test_a_cancel_raised_by_model_or_loss_counts_as_well():
    def loss(pred, target):
        raise CancelBatchException

    events = heard_in_fit(loss_func=loss, dls=loaders(1, None))
    assert events[3:8] == ["before_batch", "after_pred", "after_cancel_batch", "after_batch", "cleanup_batch"]


def test_cancel_of_a_batch_in_validation_goes_on_with_the_next_one():
    events = heard_in_fit(raise_at("after_pred", CancelBatchException, training=False), dls=loaders(1, 2))
    start = events.index("before_validate")
    batch = ["before_batch", "after_pred", "after_cancel_batch", "after_batch", "cleanup_batch"]
    assert events[start + 1 : start + 11] == [*batch, *VALID_BATCH]


def test_cancel_of_the_training_goes_on_with_the_validation():
    events = heard_in_fit(raise_at("after_batch", CancelTrainException))
    train = ["before_train", *TRAIN_BATCH, "after_cancel_train", "after_train", "cleanup_train"]
    assert events == ["before_fit", "before_epoch", *train, *VALIDATE, *EPOCH[-2:], *FIT_END]


def test_cancel_of_the_validation_goes_on_with_the_end_of_the_epoch():
    events = heard_in_fit(raise_at("before_validate", CancelValidException))
    validate = ["before_validate", "after_cancel_validate", "after_validate", "cleanup_validate"]
    assert events == ["before_fit", "before_epoch", *TRAIN, *validate, *EPOCH[-2:], *FIT_END]


def test_cancel_of_an_epoch_goes_on_with_the_next_one():
    events = heard_in_fit(raise_at("before_epoch", CancelEpochException), n_epoch=2)
    epoch = ["before_epoch", "after_cancel_epoch", "after_epoch", "cleanup_epoch"]
    assert events == ["before_fit", *epoch, *EPOCH, *FIT_END]


def test_cancel_of_the_fit_ends_it():
    events = heard_in_fit(raise_at("after_epoch", CancelFitException), n_epoch=3)
    assert events == ["before_fit", *EPOCH, "after_cancel_fit", *FIT_END]


def test_cancel_in_before_fit_skips_the_epochs():
    events = heard_in_fit(raise_at("before_fit", CancelFitException), n_epoch=3)
    assert events == ["before_fit", "after_cancel_fit", *FIT_END]


def test_cancel_of_the_backward_pass_goes_on_with_the_step():
    events = heard_in_fit(raise_at("before_backward", CancelBackwardException), dls=loaders(1, None))
    backward = ["before_backward", "after_cancel_backward", "after_backward", "cleanup_backward"]
    assert events[3:-6] == [*TRAIN_BATCH[:3], *backward, *STEP, "after_batch", "cleanup_batch"]


def test_cancel_of_the_step_goes_on_with_the_end_of_the_batch():
    events = heard_in_fit(raise_at("before_step", CancelStepException), dls=loaders(1, None))
    step = ["before_step", "after_cancel_step", "after_step", "cleanup_step"]
    assert events[3:-6] == [*TRAIN_BATCH[:6], *step, "after_batch", "cleanup_batch"]


def test_after_fit_fires_once_in_a_cancelled_fit():
    events = heard_in_fit(raise_at("after_pred", CancelFitException))
    assert events.count("after_fit") == events.count("cleanup_fit") == 1


# Who still hears the event in which a cancel is raised


def test_callbacks_later_in_the_order_do_not_hear_the_event_of_a_cancel():
    before, after = Heard(["before_batch"]), Heard(["before_batch"])
    before.order, after.order = -1, 1
    learner([before, raise_at("before_batch", CancelBatchException), after], dls=loaders(2, None)).fit(1)
    assert (len(before.events), len(after.events)) == (2, 1)


@pytest.mark.parametrize(("law", "sees"), [("run_before", 2), ("run_after", 1)])
def test_laws_say_who_gets_to_see_a_batch_that_is_rejected(law, sees):
    watcher = Heard(["before_batch"])
    watcher.order = 0
    setattr(watcher, law, Once)
    learner([watcher, raise_at("before_batch", CancelBatchException)], dls=loaders(2, None)).fit(1)
    assert len(watcher.events) == sees


# A cancel of an outer span passes through the inner ones


@pytest.mark.parametrize(
    ("span", "passed"),
    [
        ("batch", ["cleanup_step"]),
        ("train", ["cleanup_step", "cleanup_batch"]),
        ("epoch", ["cleanup_step", "cleanup_batch", "cleanup_train"]),
        ("fit", ["cleanup_step", "cleanup_batch", "cleanup_train", "cleanup_epoch"]),
    ],
)
def test_a_cancel_of_an_outer_span_passes_inner_ones_with_cleanups_but_without_after(span, passed):
    events = heard_in_fit(raise_at("before_step", CANCELS[span]))
    start = events.index("before_step") + 1
    end = events.index(f"after_cancel_{span}")
    assert events[start:end] == passed
    assert events[end + 1 : end + 3] == [f"after_{span}", f"cleanup_{span}"]


def test_a_cancel_of_an_outer_span_passes_the_validation():
    events = heard_in_fit(raise_at("after_loss", CancelEpochException, training=False))
    start = events.index("before_validate")
    assert events[start + 1 :] == [
        *("before_batch", "after_pred", "after_loss", "cleanup_batch", "cleanup_validate"),
        *("after_cancel_epoch", "after_epoch", "cleanup_epoch", *FIT_END),
    ]


def test_cancels_that_cross_run_each_cleanup_once():
    """A batch is cancelled, and what answers to that cancels the epoch."""
    cbs = [raise_at("before_batch", CancelBatchException), raise_at("after_cancel_batch", CancelEpochException)]
    events = heard_in_fit(*cbs)
    assert events[3:9] == [
        *("before_batch", "after_cancel_batch", "cleanup_batch", "cleanup_train"),
        *("after_cancel_epoch", "after_epoch"),
    ]


# A cancel at the end of its own span is absorbed


@pytest.mark.parametrize("span", CANCELS)
@pytest.mark.parametrize("where", ["after", "after_cancel"])
def test_a_cancel_raised_at_the_end_of_its_own_span_changes_nothing_any_more(span, where):
    def heard(*cbs):
        cancelled = [raise_at(f"before_{span}", CANCELS[span])] if where == "after_cancel" else []
        return heard_in_fit(*cancelled, *cbs)

    assert heard(raise_at(f"{where}_{span}", CANCELS[span])) == heard()


@pytest.mark.parametrize("span", CANCELS)
def test_callbacks_later_in_the_order_do_not_hear_an_absorbed_event(span):
    after = Heard([f"after_{span}"])
    after.order = 5
    learner([raise_at(f"after_{span}", CANCELS[span]), after], dls=loaders(1, 1)).fit(1)
    assert len(after.events) == (1 if span == "batch" else 0)


# A cancel whose span is not running


@pytest.mark.parametrize(
    ("event_name", "span", "training"),
    [
        ("before_fit", "epoch", None),
        ("before_epoch", "batch", None),
        ("before_train", "validate", None),
        ("after_pred", "validate", True),
        ("after_pred", "train", False),
        ("after_loss", "step", True),
        ("before_step", "backward", True),
        ("after_train", "batch", None),
        ("after_epoch", "train", None),
        ("after_fit", "epoch", None),
    ],
)
def test_a_cancel_whose_span_is_not_running_leaves_fit_with_a_message_and_cleanups_only(event_name, span, training):
    heard = Heard()
    learn = learner([heard, raise_at(event_name, CANCELS[span], training)])
    with pytest.raises(CANCELS[span]) as caught:
        learn.fit(1)
    name = CANCELS[span].__name__
    assert str(caught.value) == f"{name} was raised where no {span} span is running, so nothing absorbs it."
    last = len(heard.events) - heard.events[::-1].index(event_name)
    assert all(e.startswith("cleanup_") for e in heard.events[last:])
    assert heard.events[-1] == "cleanup_fit"


def test_the_message_of_a_wrong_cancel_is_a_note_where_it_has_one_of_its_own():
    learn = learner(raise_at("before_epoch", CancelBatchException("no batch yet")))
    with pytest.raises(CancelBatchException, match="no batch yet") as caught:
        learn.fit(1)
    assert "where no batch span is running" in caught.value.__notes__[0]


def test_a_plain_cancel_is_absorbed_by_nobody():
    learn = learner(raise_at("after_pred", CancelException))
    with pytest.raises(CancelException, match="belongs to no span; raise one of its subclasses"):
        learn.fit(1)


def test_a_subclass_of_a_cancel_cancels_the_same_span():
    class Enough(CancelTrainException):
        pass

    events = heard_in_fit(raise_at("after_batch", Enough))
    assert events.count("after_cancel_train") == 1 and events[-1] == "cleanup_fit"


def test_all_cancels_are_exceptions_of_one_kind():
    assert all(issubclass(c, CancelException) for c in CANCELS.values())
    assert issubclass(CancelException, Exception)
    assert {span.name: span.cancel for span in SPANS} == CANCELS


# Each cancel at each event


def places():
    for event in EVENTS:
        if event == "after_create":
            continue
        yield event, None
        if event in (*VALID_BATCH, "after_cancel_batch"):
            yield event, False


@pytest.mark.parametrize("span", CANCELS)
def test_whatever_is_cancelled_wherever_every_span_that_began_is_cleaned_up_once(span):
    for event, training in places():
        error = CANCELS[span]
        cbs = [raise_at(event, error, training)]
        if event.startswith("after_cancel_"):
            inner = event.removeprefix("after_cancel_")
            cbs.append(raise_at(f"before_{inner}", CANCELS[inner], training))
        heard = Heard()
        learn = learner([heard, *cbs], dls=loaders(2, 2))
        try:
            learn.fit(2)
        except (CancelException, RuntimeError) as left:
            assert event.startswith("cleanup_") == isinstance(left, RuntimeError)
            assert "after_fit" not in heard.events[:-1] or heard.events[-2] == "after_fit"
        check_nesting(heard.events)
        assert learn.task is None and not learn._open_spans
        heard.events.clear()
        learn.fit(1)  # usable, and all there
        assert heard.events.count("after_batch") == 4 and heard.events[-2:] == FIT_END


def check_nesting(events):
    """Spans open with `before_X`, and close with `cleanup_X` after at most one `after_cancel_X` and one `after_X`."""
    open_spans = []
    for event in events:
        kind, _, span = event.rpartition("_")
        if span not in CANCELS:
            continue
        if kind == "before":
            open_spans.append((span, []))
            continue
        assert open_spans[-1][0] == span, events
        if kind == "cleanup":
            ends = open_spans.pop()[1]
            assert ends in ([], ["after"], ["after_cancel"], ["after_cancel", "after"]), events
        else:
            open_spans[-1][1].append(kind)
    assert open_spans == []


# Cleanups


def test_cleanups_fire_last_and_innermost_first_after_an_error():
    events = heard_in_fit(raise_at("before_step", ValueError), error=ValueError)
    start = events.index("before_step")
    assert events[start + 1 :] == [f"cleanup_{s}" for s in ("step", "batch", "train", "epoch", "fit")]


def test_cleanups_fire_after_an_error_in_the_loader():
    def batches():
        yield from loaders(1).train
        raise OSError("disk")

    dls = loaders(1)
    dls.loaders[0] = type("Breaking", (), {"__iter__": lambda self: batches()})()
    events = heard_in_fit(error=OSError, dls=dls)
    assert events[-4:] == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_cleanups_fire_also_for_exceptions_that_are_no_errors(error):
    assert heard_in_fit(raise_at("after_epoch", error), error=error)[-3:] == [
        "after_epoch",
        "cleanup_epoch",
        "cleanup_fit",
    ]


def test_cleanups_run_in_reverse_order():
    order = []
    cbs = [Callback(cleanup_train=lambda cb, i=i: order.append(i)) for i in range(3)]
    cbs[0].order = 9
    learner(cbs).fit(1)
    assert order == [0, 2, 1]


def test_cleanups_go_also_to_those_whose_before_never_ran():
    late = Heard(["before_batch", "cleanup_batch"])
    late.order = 5
    learner([raise_at("before_batch", CancelBatchException), late], dls=loaders(1, None)).fit(1)
    assert late.events == ["cleanup_batch"]


@pytest.mark.parametrize("span", CANCELS)
def test_a_cancel_in_before_reaches_every_cleanup_of_the_span(span):
    late = Heard([f"cleanup_{span}"])
    late.order = 5
    learner([raise_at(f"before_{span}", CANCELS[span]), late], dls=loaders(1, 1)).fit(1)
    assert len(late.events) == (2 if span == "batch" else 1)


def test_what_a_cleanup_raises_waits_until_the_others_have_run():
    order = []
    first, last = (Callback(cleanup_batch=lambda cb, i=i: order.append(i)) for i in range(2))
    learn = learner([first, raise_at("cleanup_batch", ValueError("mine")), last])
    with pytest.raises(ValueError, match="mine"):
        learn.fit(1)
    assert order == [1, 0]


def test_an_error_in_a_cleanup_passes_the_outer_spans_with_their_cleanups():
    events = heard_in_fit(raise_at("cleanup_batch", ValueError), error=ValueError)
    assert events[-4:] == ["cleanup_batch", "cleanup_train", "cleanup_epoch", "cleanup_fit"]
    assert "after_train" not in events


def left_by(*cbs):
    """The exception that leaves a fit, and the other ones that its notes tell of."""
    with pytest.raises(BaseException) as caught:
        learner(list(cbs)).fit(1)
    notes = getattr(caught.value, "__notes__", [])
    return caught.value, [n for n in notes if n.startswith("also raised")]


def test_what_a_cleanup_raises_is_a_note_on_the_first_error():
    first, second = ValueError("first"), KeyError("second")
    left, notes = left_by(raise_at("after_pred", first), raise_at("cleanup_batch", second))
    assert left is first
    assert notes[0].startswith(
        "also raised: KeyError: 'second' (raised by Once.cleanup_batch at epoch 0, batch 0, train"
    )


def test_of_several_cleanups_the_first_error_is_raised_with_the_others_as_notes():
    errors = [ValueError(i) for i in range(3)]
    left, notes = left_by(*[raise_at("cleanup_batch", e) for e in errors])
    assert left is errors[2]
    assert [n.split(" (")[0] for n in notes] == ["also raised: ValueError: 1", "also raised: ValueError: 0"]


def test_errors_in_cleanups_of_several_spans_all_come_to_light():
    first, second = ValueError("inner"), ValueError("outer")
    left, notes = left_by(raise_at("cleanup_batch", first), raise_at("cleanup_fit", second))
    assert left is first and notes[0].startswith("also raised: ValueError: outer")


def test_a_keyboard_interrupt_in_a_cleanup_wins_over_an_error():
    error = ValueError("error")
    left, notes = left_by(raise_at("after_pred", error), raise_at("cleanup_batch", KeyboardInterrupt()))
    assert type(left) is KeyboardInterrupt
    assert notes[0].startswith("also raised: ValueError: error")


def test_a_keyboard_interrupt_in_a_cleanup_wins_over_earlier_cleanups():
    ran = []
    cbs = [
        Callback(cleanup_batch=lambda cb: ran.append(1)),
        raise_at("cleanup_batch", KeyboardInterrupt()),
        raise_at("cleanup_batch", ValueError("error")),
    ]
    left, notes = left_by(*cbs)
    assert type(left) is KeyboardInterrupt and notes[0].startswith("also raised: ValueError: error") and ran == [1]


def test_a_keyboard_interrupt_that_is_on_its_way_stays():
    interrupt = KeyboardInterrupt()
    left, notes = left_by(raise_at("after_pred", interrupt), raise_at("cleanup_batch", ValueError("error")))
    assert left is interrupt and notes[0].startswith("also raised: ValueError: error")


@pytest.mark.parametrize("span", CANCELS)
def test_a_cancel_raised_in_a_cleanup_is_an_error(span):
    cancel = CANCELS[span]()
    left, _ = left_by(raise_at("cleanup_batch", cancel))
    assert type(left) is RuntimeError
    assert str(left) == (
        f"{CANCELS[span].__name__} was raised in `Once.cleanup_batch`: a cleanup cannot cancel. Use `after_batch`."
    )
    assert left.__cause__ is cancel


def test_an_error_in_a_cleanup_wins_over_a_cancel_that_passes_by():
    error = ValueError("mine")
    left, _ = left_by(raise_at("after_pred", CancelFitException), raise_at("cleanup_batch", error))
    assert left is error


def test_an_error_in_a_cleanup_after_an_absorbed_cancel_leaves_the_fit():
    error = ValueError("mine")
    left, notes = left_by(raise_at("after_pred", CancelBatchException), raise_at("cleanup_batch", error))
    assert left is error and notes == []


def test_an_error_in_cleanup_fit_leaves_a_learner_that_works():
    heard = Heard(["cleanup_fit"])
    learn = learner([heard, raise_at("cleanup_fit", ValueError)])
    with pytest.raises(ValueError):
        learn.fit(1)
    assert learn.task is None and learn.pred is None
    learn.fit(1)
    assert len(heard.events) == 2


# What is open, and what an error says of it


def test_a_span_is_open_from_before_it_to_its_cleanup():
    names = ["before_fit", "before_train", "after_loss", "before_step", "after_batch", "after_train", "after_fit"]
    spans = [[], []]
    for found, more in zip(spans, ((), ("cleanup_step", "cleanup_train", "cleanup_fit")), strict=True):
        look = lambda cb, found=found: found.append(" ".join(map(str, cb.learn._open_spans)))  # noqa: E731
        learner(Callback(**dict.fromkeys([*names, *more], look)), dls=loaders(1, None)).fit(1)
    train, batch, step = "fit epoch train", "fit epoch train batch", "fit epoch train batch step"
    assert spans[0] == ["fit", train, batch, step, batch, train, "fit"]
    assert spans[1] == ["fit", train, batch, step, step, batch, train, train, "fit", "fit"]


def raised_in_the_loss(error):
    def loss(pred, target):
        raise error

    with suppress(type(error)):
        learner(loss_func=loss).fit(1)
    return getattr(error, "__notes__", [])


def test_an_error_in_a_batch_that_no_handler_raised_is_noted_with_the_batch():
    (note,) = raised_in_the_loss(ValueError())
    assert note.startswith("raised by the model, the loss or the optimizer at epoch 0, batch 0, train\n  xb: (float32")


@pytest.mark.parametrize("error", [KeyboardInterrupt, CancelFitException, CancelBatchException])
def test_what_is_no_error_is_not_noted(error):
    assert raised_in_the_loss(error()) == []


def test_an_error_outside_of_a_batch_is_no_models():
    with pytest.raises(ValueError, match="yielded no batch") as caught:
        learner(dls=DataLoaders(iter([]), device="cpu")).fit(1)
    assert not getattr(caught.value, "__notes__", [])


# Ctrl-C


@pytest.mark.parametrize(
    ("event_name", "follow"),
    [
        ("before_fit", []),
        ("before_epoch", ["cleanup_epoch"]),
        ("before_train", ["cleanup_train", "cleanup_epoch"]),
        ("after_loss", [*BACKWARD, *STEP, *TRAIN_BATCH[-2:], "cleanup_train", "cleanup_epoch"]),
        ("after_step", ["cleanup_step", *TRAIN_BATCH[-2:], "cleanup_train", "cleanup_epoch"]),
        ("after_train", ["cleanup_train", "cleanup_epoch"]),
        ("before_validate", ["cleanup_validate", "cleanup_epoch"]),
        ("after_validate", ["cleanup_validate", *EPOCH[-2:]]),
    ],
)
def test_ctrl_c_ends_the_fit_where_the_next_epoch_phase_or_batch_begins_or_the_batch_ends(event_name, follow):
    press = Once(event_name, lambda cb: signal.raise_signal(signal.SIGINT))
    events = heard_in_fit(press, n_epoch=2, error=KeyboardInterrupt, dls=loaders(1, 1))
    assert events[events.index(event_name) + 1 :] == [*follow, "after_cancel_fit", *FIT_END]


def test_a_second_ctrl_c_in_a_cleanup_is_raised_behind_all_cleanups_of_the_span():
    done = []

    def press_twice(cb):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        done.append("first")

    learn = learner([Callback(cleanup_batch=lambda cb: done.append("second")), Once("cleanup_batch", press_twice)])
    with pytest.raises(KeyboardInterrupt, match=r"a second Ctrl-C cut the fit where it was"):
        learn.fit(1)
    assert done == ["first", "second"]


def test_a_second_ctrl_c_waits_for_the_few_instructions_between_a_span_and_its_cleanup():
    frames = []
    learner(Once("before_fit", lambda cb: frames.append(sys._getframe()))).fit(0)
    frame = frames[0]
    while frame.f_code.co_name != "run_span":
        assert not interrupt._must_wait(frame)
        frame = frame.f_back
    assert interrupt._must_wait(frame)


# A block inside of the fit and epoch spans


def test_a_with_block_lies_inside_of_the_spans_of_a_fit_and_an_epoch():
    learn = learner(heard := Heard())
    heard.events.clear()
    with learn:
        heard.events.append(" ".join(map(str, learn._open_spans)))
    assert heard.events == ["before_fit", "before_epoch", "fit epoch", *EPOCH[-2:], *FIT_END]


@pytest.mark.parametrize("error", [ValueError, CancelEpochException, KeyboardInterrupt])
def test_an_error_at_the_beginning_of_a_with_block_leaves_with_the_cleanups(error):
    learn = learner([heard := Heard(), raise_at("before_epoch", error)])
    heard.events.clear()
    with pytest.raises(error), learn:
        heard.events.append("never")
    assert heard.events == ["before_fit", "before_epoch", "cleanup_epoch", "cleanup_fit"]


# What a cancel does to the training


def test_a_cancelled_batch_does_not_move_the_weights():
    learn = learner(Callback(after_loss=raising(CancelBatchException)))
    before = weights(learn)
    learn.fit(1)
    assert weights(learn).equal(before)


def test_a_cancelled_batch_does_not_clear_gradients_so_that_they_add_up():
    grads = []

    def keep(cb):
        grads.append(cb.learn.model.weight.grad.item())

    cbs = [raise_at("after_backward", CancelBatchException), Callback(before_step=keep)]
    learn = learner(cbs, dls=loaders(2, None))
    learn.model.weight.data.zero_(), learn.model.bias.data.zero_()
    learn.fit(1)
    # d/dw of the mean of (w x + b - y)²: with w = b = 0 it is -2 mean(x y); y is 2 x + 1, x is 0, 1/3 and 2/3, 1.
    first, second = -(1 / 3 * 5 / 3), -(2 / 3 * 7 / 3 + 3)
    assert grads == [pytest.approx(first + second)]


@pytest.mark.parametrize("span", ["backward", "step"])
def test_a_cancelled_backward_or_step_still_clears_gradients(span):
    learn = learner(raise_at(f"before_{span}", CANCELS[span]), dls=loaders(1, None))
    learn.fit(1)
    assert learn.model.weight.grad is None


def test_a_cancelled_step_does_not_move_the_weights():
    learn = learner(Callback(before_step=raising(CancelStepException)))
    before = weights(learn)
    learn.fit(1)
    assert weights(learn).equal(before)


def test_gradients_are_there_in_after_step_and_gone_in_after_batch():
    seen = []
    look = lambda cb: seen.append(cb.learn.model.weight.grad is None)  # noqa: E731
    learner(Callback(after_step=look, after_batch=look), dls=loaders(1, None)).fit(1)
    assert seen == [False, True]


def test_the_model_is_left_in_eval_mode_as_in_fastai():
    learn = learner(TrainEvalCallback())
    learn.fit(1)
    assert not learn.model.training


# Silent spans


def by_its_steps(learn):
    """The same learner; as a step was set on it, the loop calls all of them."""
    learn._step = learn._step
    return learn


both_ways = pytest.mark.parametrize("made", [lambda learn: learn, by_its_steps], ids=["written out", "by its steps"])


@both_ways
def test_a_span_that_nobody_listens_to_still_absorbs_its_cancel(made):
    class Optimizer:
        def step(self):
            raise CancelStepException

    learn = made(learner(Callback(after_backward=lambda cb: None), dls=loaders(1, None)))
    learn.create_opt()
    learn.opt.step = Optimizer().step
    learn.fit(1)
    assert learn.opt_iter == 0 and learn.train_iter == 1


@both_ways
def test_a_span_that_nobody_listens_to_does_its_work(made):
    learn = made(learner(dls=loaders(1, None)))
    before = weights(learn)
    learn.fit(1)
    assert learn.opt_iter == 1 and not weights(learn).equal(before)


def test_a_callback_added_inside_the_body_of_a_silent_span_hears_its_end():
    heard = Heard()

    def add(cb):
        cb.learn.add_cb(heard)

    learner(Once("before_batch", add), dls=loaders(1, None)).fit(1)
    assert heard.events == [
        *TRAIN_BATCH[1:],
        *("after_train", "cleanup_train", "after_epoch", "cleanup_epoch", "after_fit", "cleanup_fit"),
    ]


@pytest.mark.parametrize("error", [ValueError, CancelFitException, KeyboardInterrupt])
def test_a_callback_added_inside_the_body_of_a_silent_span_hears_its_cleanup_also_after_an_error(error):
    heard = Heard()
    learn = learner([Once("before_batch", lambda cb: cb.learn.add_cb(heard))], dls=loaders(1, None))

    def loss(pred, target):
        raise error

    learn.loss_func = loss
    if error is CancelFitException:
        learn.fit(1)
        end = ["after_cancel_fit", *FIT_END]
    else:
        with pytest.raises(error):
            learn.fit(1)
        end = ["cleanup_fit"]
    assert heard.events == ["after_pred", "cleanup_batch", "cleanup_train", "cleanup_epoch", *end]


def test_a_callback_added_inside_a_silent_span_and_removed_there_gets_its_cleanup():
    heard = Heard(["cleanup_train", "cleanup_epoch", "cleanup_fit"])

    def add(cb):
        cb.learn.add_cb(heard)

    def remove(cb):
        cb.learn.remove_cb(heard)

    learner([Once("before_batch", add), Once("after_batch", remove)], dls=loaders(1, None)).fit(1)
    assert heard.events == ["cleanup_train", "cleanup_epoch", "cleanup_fit"]


@both_ways
def test_a_callback_added_while_the_step_runs_hears_the_end_of_the_step(made):
    heard = Heard(STEP)
    learn = made(learner(dls=loaders(1, None)))
    learn.create_opt()
    step = learn.opt.step

    def step_and_add():
        step()
        learn.add_cb(heard)

    learn.opt.step = step_and_add
    learn.fit(1)
    assert heard.events == ["after_step", "cleanup_step"]


def test_a_cancel_at_the_end_of_a_span_that_was_silent_is_absorbed():
    def fails(cb):
        raise CancelTrainException

    late = Callback(after_train=fails, cleanup_train=lambda cb: closed.append(1))
    closed = []
    learner(Once("before_batch", lambda cb: cb.learn.add_cb(late))).fit(1)
    assert closed == [1]


def test_batch_events_of_a_fit_are_those_that_the_list_names():
    assert {*TRAIN_BATCH, "after_cancel_batch", "after_cancel_backward", "after_cancel_step"} == {
        *BATCH_EVENTS,
        *("cleanup_backward", "cleanup_step", "cleanup_batch"),
    }
