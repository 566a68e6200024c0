"""How a run begins and ends: from outside, or nested in one that goes on."""

from collections.abc import Callable
from typing import Any

import torch

from learnloop.loop.cancel import CancelException
from learnloop.loop.dispatch import OuterRun, instances
from learnloop.loop.interrupt import StopButton, uncut
from learnloop.loop.spans import EPOCH, FIT, SPANS, run_span
from learnloop.loop.state import ASIDE, COUNTERS, capture, restore, set_aside

#: What a run that is undone moves besides what a state holds.
_UNDONE = (*ASIDE, *COUNTERS, "_kept", "_batches_done", "_first_epoch")


def run_outermost(learn: Any, task: str, cbs: Any, body: Callable[[], Any]) -> None:
    """A run from outside: callbacks are taken over, `cbs` join for it, and at its end nothing of it stays alive."""
    joining, joined = instances(cbs), []
    learn.task, has_gradients = task, torch.is_grad_enabled()
    try:
        _take_callbacks(learn)
        learn._add(joining)
        joined = joining
        body()
    except CancelException as error:
        _explain(error, learn)
        raise
    finally:
        torch.set_grad_enabled(has_gradients)  # a signal that raises inside of torch's `no_grad` may leave them off
        end_run(learn, joined)


def run_beside(learn: Any, task: str, cbs: Any, body: Callable[[], Any], spans: bool) -> None:
    """A run that training does not need: everything it moves is put back, also after an error.

    From outside it gets a fit and an epoch span around it, if `spans`; inside a run it fires neither, and the callbacks
    that started it do not hear it.
    """
    with set_aside(learn):
        if learn.task is None and spans:
            run_outermost(learn, task, cbs, lambda: run_span(learn, FIT, lambda: run_span(learn, EPOCH, body)))
        elif learn.task is None:
            run_outermost(learn, task, cbs, body)
        else:
            _run_nested(learn, task, cbs, body)


def run_undone(
    learn: Any,
    task: str,
    cbs: Any,
    body: Callable[[], Any],
    reassemble: Callable[[], Any] | None = None,  # puts parts back into their places, before the state is loaded
) -> Any:
    """A run from outside that trains and of which nothing stays: whatever ends it, the learner is put back as it was.

    Returns what it kept: losses and rates. Ctrl-C ends it at once, but does not cut the putting back.
    """
    former = list(learn.cbs), {n: learn.__dict__[n] for n in _UNDONE if n in learn.__dict__}
    with StopButton(learn, at_once=True):
        state = capture(learn)
        try:
            run_outermost(learn, task, cbs, body)
            return learn._kept
        finally:
            _undo(learn, *former, state, reassemble)


@uncut
def _undo(learn: Any, cbs: list[Any], attributes: dict[str, Any], state: dict[str, Any], reassemble: Any) -> None:
    learn._detach([cb for cb in learn.cbs if not any(cb is former for former in cbs)])
    learn._put_back([(i, cb) for i, cb in enumerate(cbs) if not any(cb is present for present in learn.cbs)])
    for name in _UNDONE:
        learn.__dict__.pop(name, None)
    learn.__dict__.update(attributes)
    if reassemble is not None:
        reassemble()
    restore(learn, state)


def _run_nested(learn: Any, task: str, cbs: Any, body: Callable[[], Any]) -> None:
    muted, outer = list(learn._muted), learn.task
    learn._muted, learn.task, learn._depth = muted + learn._callers(), task, learn._depth + 1
    learn._outer_runs.append(OuterRun(len(learn._open_spans), outer, muted))
    joining, joined = instances(cbs), []
    try:
        learn._add(joining)
        joined = joining
        learn._rebuild()
        body()
    finally:
        learn._outer_runs.pop()
        learn._muted, learn.task, learn._depth = muted, outer, learn._depth - 1
        learn._detach(joined)
        learn._rebuild()


def _take_callbacks(learn: Any) -> None:
    """Callbacks shared by several learners follow the one that runs; patched classes are seen from here on."""
    for cb in learn.cbs:
        if cb.learn is not learn:
            object.__setattr__(cb, "learn", learn)
    learn._rebuild()


@uncut
def end_run(learn: Any, joined: list[Any]) -> None:
    """Lets go of batch, graph and loader, switches every callback on again, removes those that came for the run."""
    learn._release()
    are_all_in = all(  # as they are outside of runs
        cb.run and learn._takes_part(cb, learn.task, []) for cb in learn.cbs
    )
    for cb in learn.cbs:
        if not cb.run:
            object.__setattr__(cb, "run", True)
    learn.task = None
    learn._open_spans.clear()
    learn._detach(joined)  # makes the tables anew if somebody leaves
    if not joined and not are_all_in:
        learn._rebuild()


def _explain(error: CancelException, learn: Any) -> None:
    """Says on a cancel that left a run that nobody was there to absorb it."""
    name = next((span.name for span in SPANS if isinstance(error, span.cancel)), None)
    if name is None:
        text = f"{type(error).__name__} belongs to no span; raise one of its subclasses, such as CancelBatchException."
    else:
        text = f"{type(error).__name__} was raised where no {name} span is running, so nothing absorbs it."
    if error.args:
        error.add_note(text)
    else:
        error.args = (text,)
