"""What a set of callbacks does: a dry run that names who hears each event, in which order and why, and writes what."""

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from learnloop import html
from learnloop.insight.conflicts import Conflict, Row, conflicts_of, span_of
from learnloop.insight.undo import untouched
from learnloop.insight.watch import Seen, Watch
from learnloop.loop.callback import Callback, handled_events
from learnloop.loop.events import BATCH_EVENTS, DOCS, EVENTS, LOOP, unknown_event
from learnloop.loop.fits import FitCall, run_dry
from learnloop.loop.interrupt import StopButton
from learnloop.loop.ordering import Placed, in_places
from learnloop.loop.spans import BACKWARD, BATCH, EPOCH, FIT, STEP, TRAIN, VALIDATE, Span

_DEPTHS = {event.name: event.depth for event in LOOP}
_TRAIN_ONLY = ("backward", "step", "train")
N_BATCH = 2  # of each phase: some callbacks keep the first one, and act from the second on


class Text(str):
    """Text that shows itself as it is, in a terminal and under a cell."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html.code(self)


@dataclass(frozen=True, repr=False)
class DryRun:
    """What a fit would do, from a few batches of it: as text in a terminal, folded in a notebook, as data."""

    title: str
    rows: tuple[Row, ...]  # in firing order, in an event as they run
    conflicts: tuple[Conflict, ...]

    @cached_property
    def writes(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """What each callback writes, by callback and event; those that write nothing have an empty dict."""
        found: dict[str, dict[str, tuple[str, ...]]] = {row.callback: {} for row in self.rows}
        for row in self.rows:
            if row.writes:
                found[row.callback][row.event] = row.writes
        return found

    def explain(self, event: str) -> Text:
        """One event in sentences: who hears it, in which order and why, what each writes, what cancels there do."""
        if event not in DOCS:
            raise ValueError(unknown_event(event))
        rows = [row for row in self.rows if row.event == event]
        heard = [f"{i}. {_sentence(row)}" for i, row in enumerate(rows, 1)] or ["No callback hears it."]
        conflicts = [f"Look out: {conflict}." for conflict in self.conflicts if conflict.where == event]
        return Text("\n".join([_what_it_is(event), *heard, *conflicts, *_cancels_at(event)]))

    def __str__(self) -> str:
        lines = [(_indented(row), *_cells(row)) for row in self.rows]
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
        shown = [self.title, ""]
        event = None
        for row, line in zip(self.rows, lines, strict=True):
            if row.event != event:
                event = row.event
                shown.append("  " * _DEPTHS[event] + event)
            cells = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))
            shown.append(f"{cells}  {line[3]}".rstrip())
        return "\n".join([*shown, "", *self._ending()])

    __repr__ = __str__

    def _ending(self) -> list[str]:
        if not self.conflicts:
            return ["conflicts: none"]
        return ["conflicts:", *(f"  {conflict}" for conflict in self.conflicts)]

    def _repr_html_(self) -> str:
        """Folded: a line per event, which opens to a table of who hears it."""
        events = dict.fromkeys(row.event for row in self.rows)
        inner = [self._folded(event) for event in events]
        conflicts = [html.paragraph(text) for text in self._ending()]
        return html.details(self.title, *inner, *conflicts, is_open=True)

    def _folded(self, event: str) -> str:
        rows = [row for row in self.rows if row.event == event]
        columns = ("callback", "why here", "phases", "writes", "reads")
        cells = [(row.callback, *_cells(row), ", ".join(row.reads)) for row in rows]
        indent = "\u2003" * _DEPTHS[event]  # spaces that a browser keeps
        return html.details(f"{indent}{event}: {', '.join(row.callback for row in rows)}", html.table(cells, columns))


def _indented(row: Row) -> str:
    return "  " * (_DEPTHS[row.event] + 2) + row.callback


def _cells(row: Row) -> tuple[str, str, str]:
    """Why, phases, and what it does."""
    phases = "both" if len(row.phases) == 2 else "".join(row.phases)
    does = [f"writes {', '.join(row.writes)}"] if row.writes else []
    does += [f"raises {', '.join(row.cancels)}"] if row.cancels else []
    does += [f"({row.note})"] if row.note else []
    return row.why, phases, "; ".join(does) or "-"


# The run


def rehearse(learn: Any, call: FitCall, n_batch: int = N_BATCH) -> DryRun:
    """What a fit would do, without doing it: its first and its last epoch are run with two batches in each phase.

    Afterwards everything is as it was, to the bit: weights, optimizer, counters, record, random states, the attributes
    of callbacks. Callbacks with `acts_outside = True` are listed and not called; `learn.save` writes nothing; what is
    printed or displayed is not shown. A callback of your own that writes files by itself should say `acts_outside`.
    """
    cbs = [*learn.cbs, *call.cbs]
    with TemporaryDirectory() as folder, StopButton(learn, at_once=True), untouched(learn, cbs) as before:
        if learn.opt is None or call.reset_opt:
            learn.create_opt()
        watch, opt = Watch(learn, Path(folder)), learn.opt
        before.opt = opt
        watch.begin()
        watch.watch_opt(opt)
        try:
            with _quietly():
                run_dry(learn, call, n_batch, before.reassemble)
        finally:
            watch.leave_opt(opt)
    return DryRun(_title(call, n_batch), *found(cbs, watch.seen, watch.fired))


def _title(call: FitCall, n_batch: int) -> str:
    length = f"{call.n_epoch}" if call.n_step is None else f"n_step={call.n_step}"
    batches = "one batch" if n_batch == 1 else f"{n_batch} batches"
    return f"dry run of fit({length}): {batches} of each phase, and nothing of it stays"


@contextmanager
def _quietly() -> Iterator[None]:
    """A context in which nothing that is printed or displayed gets out; warnings do."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.utils.capture import capture_output

        with capture_output(stderr=False):
            yield
    else:
        with redirect_stdout(io.StringIO()):
            yield


def outline(cbs: Iterable[Any]) -> str:
    """Every event in firing order with the callbacks that hear it, in their order; nothing is run."""
    places = in_places(cbs)
    lines = []
    for event in LOOP:
        heard = [placed.cb for placed in _at(places, event.name)]
        title = "  " * event.depth + event.name
        lines.append(f"{title:<26} {heard or ''}".rstrip())
    return "\n".join(lines)


# From what was seen to rows


def found(cbs: list[Any], seen: Sequence[Seen], fired: set[str]) -> tuple[tuple[Row, ...], tuple[Conflict, ...]]:
    """Rows and conflicts, from the callbacks as they were added and what was seen of them."""
    later = [s.cb for s in seen if not any(s.cb is cb for cb in cbs)]  # added by others
    places = in_places([*cbs, *dict.fromkeys(later)])
    names = _names([placed.cb for placed in places])
    rows, owners = [], []
    for event in EVENTS[1:]:  # `after_create` fired when the learner was made
        for placed in _at(places, event):
            rows.append(_row(placed, event, names, seen, fired))
            owners.append(placed)
    return tuple(rows), tuple(conflicts_of(rows, owners))


def _at(places: list[Placed], event: str) -> list[Placed]:
    """Those that hear an event, as they run."""
    heard = [placed for placed in places if event in _heard(placed.cb)]
    return heard[::-1] if event.startswith("cleanup_") else heard


def _heard(cb: Any) -> Iterable[str]:
    return EVENTS if type(cb).__call__ is not Callback.__call__ else handled_events(cb)


def _names(cbs: list[Any]) -> dict[int, str]:
    """By id: the class, with a number from the second of a class on."""
    names: dict[int, str] = {}
    for cb in cbs:
        kind = type(cb).__name__
        n = sum(name.partition(" ")[0] == kind for name in names.values())
        names[id(cb)] = f"{kind} ({n + 1})" if n else kind
    return names


def _row(placed: Placed, event: str, names: dict[int, str], seen: Sequence[Seen], fired: set[str]) -> Row:
    cb = placed.cb
    mine = [s for s in seen if s.cb is cb and s.event == event]
    writes = sorted({name for s in mine for name in s.writes})
    reads = sorted({name for s in mine for name in s.reads})
    cancels = sorted({s.cancels for s in mine if s.cancels})
    tasks = (cb.tasks,) if isinstance(cb.tasks, str) else tuple(cb.tasks)
    note = "" if mine else _why_not(placed, event, names, seen, fired)
    details = tuple(writes), tuple(reads), tuple(cancels), note
    return Row(event, names[id(cb)], str(placed), _phases(cb, event), tasks, *details)


def _why_not(placed: Placed, event: str, names: dict[int, str], seen: Sequence[Seen], fired: set[str]) -> str:
    cb = placed.cb
    if cb.acts_outside:
        return "not called, for it acts outside"
    if "fit" not in cb.tasks:
        return "takes no part in a fit"
    if event not in fired:
        return "did not fire"
    who = next((s for s in seen if s.event == event and s.cancels), None)
    return "not called" if who is None else f"not called, for {names[id(who.cb)]} cancels before"


def _phases(cb: Any, event: str) -> tuple[str, ...]:
    span = span_of(event)
    wanted = ["train"] if span in _TRAIN_ONLY else ["validate"] if span == "validate" else []
    wanted = ["train", "validate"] if span == "batch" else wanted
    heard = {"train": cb.run_train, "validate": cb.run_valid}
    return tuple(phase for phase in wanted if event not in BATCH_EVENTS or heard[phase])


# Sentences


def _what_it_is(event: str) -> str:
    around = " > ".join(span.name if isinstance(span, Span) else span for span in _around(event))
    inside = f" in {around}" if around else " when the learner is made"
    return f"{event}: {DOCS[event]}. It fires{inside}."


def _sentence(row: Row) -> str:
    only = f" in {row.phases[0]} only" if len(row.phases) == 1 and row.event in BATCH_EVENTS else ""
    text = f"{row.callback} ({row.why}) hears it{only}"
    if row.note:
        return f"{text}: {row.note}."
    does = [f"writes {_and(row.writes)}" if row.writes else "writes nothing of the learner's"]
    does += [f"raises {_and(row.cancels)}"] if row.cancels else []
    return f"{text}, and {' and '.join(does)}."


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _around(event: str) -> list[Any]:
    """The spans in which an event fires, outermost first."""
    name = span_of(event)
    if name == "create":
        return []
    outer: list[Any] = [FIT, EPOCH]
    if name in ("fit", "epoch"):
        return outer[: 1 + (name == "epoch")]
    if name in ("train", "validate"):
        return [*outer, TRAIN if name == "train" else VALIDATE]
    if name == "batch":
        return [*outer, "train or validate", BATCH]
    return [*outer, TRAIN, BATCH, BACKWARD if name == "backward" else STEP]


def _cancels_at(event: str) -> Iterator[str]:
    """What each cancel exception does there."""
    spans = [s for span in _around(event) for s in ((TRAIN, VALIDATE) if span == "train or validate" else (span,))]
    if event.startswith("cleanup_"):
        yield "A cancel exception is an error here: the span is over, and nothing is left to skip."
        return
    for span in reversed(spans):
        name = span.cancel.__name__
        if span.name == span_of(event) and event.startswith("after_") and event not in ("after_pred", "after_loss"):
            yield f"{name} does nothing here: the span is over anyway."
        else:
            text = (span.cancel.__doc__ or "").strip()
            yield f"{name} {text[0].lower()}{text[1:]}"
