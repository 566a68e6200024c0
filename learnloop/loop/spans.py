"""A span: before, body, cancel, after, cleanup. Every one of them runs through `run_span`."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from learnloop.loop.cancel import (
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
)
from learnloop.loop.dispatch import calls_handlers, owner_of
from learnloop.loop.interrupt import cut_short, uncut, uncut_on_top
from learnloop.loop.notes import add_note, first_of, in_cleanup

uncut(add_note)  # it runs between an error and its cleanup


class Span:
    """The names of a span's events, the exception that cancels it, and whether Ctrl-C may stop it."""

    __slots__ = ("after", "after_cancel", "before", "cancel", "cleanup", "name", "stops")

    def __init__(
        self,
        name: str,
        cancel: type[CancelException],
        stops: bool = False,  # Ctrl-C may stop before it
    ):
        self.name, self.cancel, self.stops = name, cancel, stops
        self.before, self.after, self.cleanup = f"before_{name}", f"after_{name}", f"cleanup_{name}"
        self.after_cancel = f"after_cancel_{name}"

    def __repr__(self) -> str:
        return self.name


FIT = Span("fit", CancelFitException)
EPOCH = Span("epoch", CancelEpochException, stops=True)
TRAIN = Span("train", CancelTrainException, stops=True)
VALIDATE = Span("validate", CancelValidException, stops=True)
BATCH = Span("batch", CancelBatchException, stops=True)
BACKWARD = Span("backward", CancelBackwardException)
STEP = Span("step", CancelStepException)
SPANS = (FIT, EPOCH, TRAIN, VALIDATE, BATCH, BACKWARD, STEP)


@uncut_on_top  # between the end of a span and its cleanup
def run_span(
    learn: Any,
    span: Span,
    body: Callable[[], Any],
    count: Callable[[], Any] | None = None,  # what the loop itself does after a cancel and before `after_X`
    entered: bool = False,  # `before_X` has fired already
) -> None:
    """Runs `body` between the events of a span. A cancel of this span ends here; `cleanup_X` always fires last."""
    if learn._stop_requested and span.stops:
        learn._stop_here()
    if not entered:
        learn._open_spans.append(span)
    try:
        try:
            if not entered and span.before not in learn._silent:
                learn(span.before)
            body()
        except span.cancel:
            with suppress(span.cancel):
                learn(span.after_cancel)
        if count is not None:
            count()
        try:
            if span.after not in learn._silent:
                learn(span.after)
        except span.cancel:
            pass  # it is over anyway
    except BaseException as error:
        if span is BATCH and isinstance(error, Exception) and not isinstance(error, CancelException):
            add_note(error, learn, "the model, the loss or the optimizer")
        clean_up(learn, span, error)
        raise
    if learn._cleanup_handlers[span.cleanup] or learn._stop_late:
        clean_up(learn, span)
    else:
        learn._open_spans.pop()
    if learn._stop_requested and span is BATCH:
        learn._stop_here()


def run_innermost(learn: Any, span: Span, body: Callable[[], Any]) -> None:
    """A span whose body sends no events: where nobody listens to it, the body runs bare."""
    silent = learn._silent
    if span.name not in silent:
        return run_span(learn, span, body)
    try:
        body()
    except span.cancel:
        pass
    if learn._silent is not silent:
        end_unheard(learn, span)
    return None


def end_unheard(learn: Any, span: Span) -> None:
    """The end of a span whose beginning nobody heard, for callbacks that were added meanwhile."""
    if span.name not in learn._silent:
        learn._open_spans.append(span)
        run_span(learn, span, _nothing, entered=True)


def _nothing() -> None:
    pass


def enter_span(learn: Any, span: Span) -> None:
    """The first half of a span, for a `with` block; `run_span(…, entered=True)` is the second."""
    learn._open_spans.append(span)
    try:
        learn(span.before)
    except BaseException as error:
        clean_up(learn, span, error)
        raise


@uncut
@calls_handlers
def clean_up(learn: Any, span: Span, error: BaseException | None = None) -> None:
    """Fires `cleanup_X` to every callback in reverse order, whatever they raise.

    What they raise becomes a note on `error`; where there is none, or it only cancels, the first of it is raised with
    the others as notes. A KeyboardInterrupt wins over everything.
    """
    handlers = learn._cleanup_handlers[span.cleanup]
    kept: list[BaseException] = []
    handler = None
    for handler in handlers:
        try:
            handler()
        except BaseException as raised:
            kept.append(in_cleanup(raised, learn, f"{owner_of(handler)!r}.{span.cleanup}"))
    learn._open_spans.pop()
    if learn._stop_late:
        kept.append(cut_short(learn))
    if kept:
        first = first_of(kept, error)
        kept.clear()  # an exception that a frame of its own traceback names would live until the next gc
        if first is not error:
            try:
                raise first
            finally:
                del first, error
