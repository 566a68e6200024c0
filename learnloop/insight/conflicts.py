"""Where two callbacks get into each other's way: from what each one writes and reads at every event."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from learnloop.loop.ordering import Placed

#: What several may change without getting into each other's way: draws follow each other, hooks stand side by side.
_SHARED = {"random state", "hooks", "a file"}
#: What every batch makes anew, so that nobody holds it longer.
_OF_A_BATCH = {"xb", "yb", "pred", "loss", "loss_grad", "gradients"}
_IN_A_BATCH = ("batch", "backward", "step")


class Row(NamedTuple):
    """A callback at an event."""

    event: str
    callback: str  # its class; with a number where there are several of one class
    why: str  # what decides its place: `order 5`, or the law that moved it
    phases: tuple[str, ...]  # train, validate; none outside of both
    tasks: tuple[str, ...]  # the runs in which it takes part
    writes: tuple[str, ...]  # what was another afterwards, or was set
    reads: tuple[str, ...]  # attributes of learner and model that it read
    cancels: tuple[str, ...]  # cancel exceptions that it raised
    note: str = ""  # why it was not called; empty where it was


class Conflict(NamedTuple):
    """Two callbacks that may get into each other's way, and no law between them says what is meant."""

    kind: str  # 'both write', 'reads before' or 'puts back'
    what: str
    first: str  # who runs earlier
    second: str
    where: str  # an event

    def __str__(self) -> str:
        if self.kind == "both write":
            return f"{self.first} and {self.second} both write {self.what} in {self.where}; {self.second} comes last"
        if self.kind == "puts back":
            return f"{self.second} puts {self.what} back in {self.where}, and so undoes what {self.first} writes"
        return f"{self.first} reads {self.what} in {self.where} before {self.second} writes it"


def conflicts_of(rows: list[Row], owners: list[Placed]) -> Iterator[Conflict]:
    """Pairs without a law between them, each with each thing once: at one event first, then over a span."""
    told: set[Any] = set()
    for find in (_at_one_event, _over_a_span):
        for j, b in enumerate(rows):
            for i, a in enumerate(rows[:j]):
                if a.callback != b.callback and not _is_settled(owners[i], owners[j]):
                    for conflict in find(a, b, rows):
                        key = (conflict.what, *sorted((a.callback, b.callback)))
                        if key not in told:
                            told.add(key)
                            yield conflict


def _at_one_event(a: Row, b: Row, rows: list[Row]) -> Iterator[Conflict]:
    """What both write, and what the earlier one reads and the later one writes."""
    if a.event != b.event or (a.phases and not set(a.phases) & set(b.phases)):
        return
    for what in b.writes:
        if what in a.writes and what not in _SHARED:
            yield Conflict("both write", what, a.callback, b.callback, a.event)
        elif what in a.reads:
            yield Conflict("reads before", what, a.callback, b.callback, a.event)


def _over_a_span(a: Row, b: Row, rows: list[Row]) -> Iterator[Conflict]:
    """What the later one puts back at the end of a span, at whose start it has set it, while `a` set it in between."""
    if not b.event.startswith(("after_", "cleanup_")):
        return
    span = span_of(b.event)
    held = next((row for row in rows if row.callback == b.callback and row.event == f"before_{span}"), None)
    if held is None or rows.index(held) > rows.index(a):
        return
    for what in a.writes:
        is_held = what in b.writes and what in held.writes and not _is_put_back(what, a, rows)
        if is_held and what not in _SHARED and (what not in _OF_A_BATCH or span in _IN_A_BATCH):
            yield Conflict("puts back", what, a.callback, b.callback, b.event)


def _is_put_back(what: str, row: Row, rows: list[Row]) -> bool:
    """Whether a callback that sets something at the start of a span sets it again at the end, or has just done that."""
    span = span_of(row.event)
    own = [r.event for r in rows if r.callback == row.callback and what in r.writes and span_of(r.event) == span]
    return len(own) > 1 and f"before_{span}" in own


def _is_settled(a: Placed, b: Placed) -> bool:
    """Whether a law between the two says that their order is meant."""
    return any(law.first is b.cb or law.second is b.cb for law in a.laws)


def span_of(event: str) -> str:
    """The span to which an event belongs."""
    name = event.rpartition("_")[2]
    return "batch" if name in ("pred", "loss") else name
