"""What an error says besides itself: who raised it, where, what the batch looked like, and what else went wrong."""

from itertools import islice
from typing import Any

from learnloop.data.batches import describe
from learnloop.loop.cancel import CancelException

#: How the error begins that torch raises wherever the main process is when a worker of a loader has died.
_DEAD_WORKER = "DataLoader worker (pid"
SHOWN = 8  # numbers of samples that a note lists


def add_note(error: BaseException, learn: Any, raiser: str, ahead: bool = False) -> None:
    """Says on an error who raised it, where, and what the batch looked like; once, where it was raised.

    `ahead`: it was raised on the way to the next batch, by a loader.
    """
    if any(note.startswith("raised by ") for note in getattr(error, "__notes__", ())):
        return
    state, is_of_worker = learn.__dict__, str(error).startswith(_DEAD_WORKER)
    where = f"raised by {raiser if not is_of_worker or ahead else 'a data worker that died, noticed'}"
    if learn.task is not None and "iter" in state:
        phase = "train" if learn.training else "validate"
        of_set = f" of `{learn.dl_name}`" if learn.dl_name not in (None, "train", "valid") else ""
        n = 0 if state["iter"] is None else state["iter"] + 1
        place = f" number {n} of epoch {learn.epoch}" if ahead else f" at epoch {learn.epoch}, batch {learn.iter}"
        where += f"{place}, {phase}{of_set}"
    if ahead:
        where += _samples("waiting for samples", learn, 1)
        if _is_broken_line(error) and getattr(state.get("dl"), "num_workers", False):
            where += "\n  a data worker died while it handed over a batch"
    elif not is_of_worker and any(span.name == "batch" for span in learn._open_spans):
        where += "".join(f"\n  {n}: {describe(state[n])}" for n in ("xb", "yb", "pred") if state.get(n) is not None)
        where += _samples("samples", learn, 0)
    error.add_note(where)


def _is_broken_line(error: BaseException) -> bool:
    """Whether the line to another process broke; of what a worker itself raised, torch says that it was `Caught`."""
    return isinstance(error, ConnectionError | EOFError) and not str(error).startswith("Caught ")


def _samples(title: str, learn: Any, ahead: int) -> str:
    """The first numbers of a batch's samples, where its loader knows them."""
    try:
        numbers = learn._sample_numbers(ahead)
        if not numbers:
            return ""
        more = f", … ({len(numbers)})" if len(numbers) > SHOWN else ""
        return f"\n  {title}: {', '.join(str(n) for n in islice(numbers, SHOWN))}{more}"
    except Exception:  # whatever a loader objects to must not stand in for the error
        return ""


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
