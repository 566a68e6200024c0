"""What an error says besides itself: who raised it, where, what the batch looked like, and what else went wrong."""

from typing import Any

from learnloop.data.batches import describe
from learnloop.loop.cancel import CancelException


def add_note(error: BaseException, learn: Any, raiser: str) -> None:
    """Says on an error who raised it, where, and what the batch looked like; once, where it was raised."""
    if any(note.startswith("raised by ") for note in getattr(error, "__notes__", ())):
        return
    state = learn.__dict__
    where = f"raised by {raiser}"
    if learn.task is not None and "iter" in state:
        phase = "train" if learn.training else "validate"
        of_set = f" of `{learn.dl_name}`" if learn.dl_name not in (None, "train", "valid") else ""
        where += f" at epoch {learn.epoch}, batch {learn.iter}, {phase}{of_set}"
    if any(span.name == "batch" for span in learn._open_spans):
        where += "".join(f"\n  {n}: {describe(state[n])}" for n in ("xb", "yb", "pred") if state.get(n) is not None)
    error.add_note(where)


def in_cleanup(raised: BaseException, learn: Any, raiser: str) -> BaseException:
    """An exception of the cleanup `raiser`, with a note; a cancel becomes an error: there is nothing left to cancel."""
    if isinstance(raised, CancelException):
        cancel, after = type(raised).__name__, raiser.rpartition(".")[2].replace("cleanup_", "after_")
        error = RuntimeError(f"{cancel} was raised in `{raiser}`: a cleanup cannot cancel. Use `{after}`.")
        error.__cause__ = raised
        raised = error
    if isinstance(raised, Exception):
        add_note(raised, learn, raiser)
    return raised


def first_of(kept: list[BaseException], error: BaseException | None = None) -> BaseException:
    """The exception that leaves cleanups, with the others as notes; a cancel on its way gives way to a real error."""
    everything = kept if error is None or isinstance(error, CancelException) else [error, *kept]
    first = next((e for e in everything if isinstance(e, KeyboardInterrupt)), everything[0])
    for other in everything:
        if other is not first:
            notes = "".join(f" ({note})" for note in getattr(other, "__notes__", ()))
            first.add_note(f"also raised: {type(other).__name__}: {other}{notes}")
    return first
