"""One order of callbacks from wishes (`order`) and laws (`run_before`, `run_after`): from a list, a list."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class OrderingError(ValueError):
    """The laws of these callbacks contradict each other."""


class Law(NamedTuple):
    """`first` runs before `second`, because of `attribute` on the one that declares it."""

    first: Any
    second: Any
    owner: Any
    attribute: str
    target: str  # as it was written

    def __str__(self) -> str:
        return f"{_name(self.owner)}.{self.attribute} = {self.target}"


def in_order(cbs: Iterable[Any]) -> list[Any]:
    """Callbacks sorted by `order` (ties as added), with every law kept.

    A law that already holds moves nothing. Otherwise the callback that declares it moves, directly before the first or
    directly after the last of its targets; what it names stays where it is. Raises OrderingError for a circle.
    """
    cbs = sorted(cbs, key=lambda cb: cb.order)
    laws = [law for cb in cbs for law in laws_of(cb, cbs)]
    if not laws:
        return cbs
    return _stable(_moved(cbs, laws), laws)


class Placed(NamedTuple):
    """A callback in its place, and why it is there."""

    cb: Any
    laws: tuple[Law, ...]  # all that bind it and another one, its own and others'
    moved_by: Law | None  # the law that took it away from where `order` puts it; None: `order` decides

    def __str__(self) -> str:
        return f"order {self.cb.order:g}" if self.moved_by is None else str(self.moved_by)


def in_places(cbs: Iterable[Any]) -> list[Placed]:
    """The same order as `in_order`, with the reason for each place."""
    cbs = sorted(cbs, key=lambda cb: cb.order)
    laws = [law for cb in cbs for law in laws_of(cb, cbs)]
    moved_by: dict[int, Law] = {}
    moved = _moved(cbs, laws, moved_by)
    ordered = _stable(moved, laws)
    for cb in ordered:
        late = [law for law in laws if law.second is cb and moved.index(law.first) > moved.index(cb)]
        if late:  # `_stable` made it wait
            moved_by[id(cb)] = late[-1]
    return [
        Placed(cb, tuple(law for law in laws if cb in (law.first, law.second)), moved_by.get(id(cb))) for cb in ordered
    ]


def laws_of(cb: Any, cbs: Sequence[Any]) -> list[Law]:
    """The laws that `cb` declares about those in `cbs`; one about an absent class is void."""
    found = []
    for attribute in ("run_before", "run_after"):
        for target in _targets(getattr(cb, attribute, ())):
            for other in cbs:
                if other is cb or isinstance(other, _declaring_class(cb, attribute)) or not _matches(other, target):
                    continue
                pair = (cb, other) if attribute == "run_before" else (other, cb)
                found.append(Law(*pair, cb, attribute, getattr(target, "__name__", str(target))))
    return found


def _targets(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, type)) else tuple(value)


def _matches(cb: Any, target: Any) -> bool:
    if isinstance(target, type):
        return isinstance(cb, target)
    return target == cb.name or any(c.__name__ == target for c in type(cb).__mro__)


def _declaring_class(cb: Any, attribute: str) -> type:
    """The class whose body holds the law: two instances of it are never bound by it."""
    if attribute in vars(cb):
        return type(cb)
    return next(c for c in type(cb).__mro__ if attribute in vars(c))


def _moved(cbs: list[Any], laws: list[Law], moved_by: dict[int, Law] | None = None) -> list[Any]:
    """Each callback whose own laws do not hold, put beside its targets.

    A place is a tuple of numbers: `(3, 0)` is the fourth in the sorted list, `(3, -1, 5, 0)` directly before it and
    `(3, 1, 5, 0)` directly after it, several of them in their own order. So nothing but the mover changes its place.
    `moved_by` gets the law that decided, by the id of who moved.
    """
    place: dict[int, tuple[int, ...]] = {id(cb): (i, 0) for i, cb in enumerate(cbs)}
    moved_by = {} if moved_by is None else moved_by
    for index in _dependents_last(cbs, laws):
        cb = cbs[index]
        for attribute in ("run_before", "run_after"):
            own = [law for law in laws if law.owner is cb and law.attribute == attribute]
            if not own:
                continue
            pick = min if attribute == "run_before" else max
            law = pick(own, key=lambda law: place[id(_other(law))])
            target = place[id(_other(law))]
            if attribute == "run_before" and place[id(cb)] > target:
                place[id(cb)], moved_by[id(cb)] = (*target[:-1], -1, index, 0), law
            elif attribute == "run_after" and place[id(cb)] < target:
                place[id(cb)], moved_by[id(cb)] = (*target[:-1], 1, index, 0), law
    return sorted(cbs, key=lambda cb: place[id(cb)])


def _other(law: Law) -> Any:
    return law.second if law.owner is law.first else law.first


def _dependents_last(cbs: list[Any], laws: list[Law]) -> list[int]:
    """Indices of `cbs` so that whoever declares a law comes after those it names, where that is possible."""
    done: list[int] = []
    visiting: set[int] = set()
    index = {id(cb): i for i, cb in enumerate(cbs)}

    def visit(i: int) -> None:
        if i in visiting or i in done:
            return
        visiting.add(i)
        for law in laws:
            if law.owner is cbs[i]:
                visit(index[id(_other(law))])
        done.append(i)

    for i in range(len(cbs)):
        visit(i)
    return done


def _stable(cbs: list[Any], laws: list[Law]) -> list[Any]:
    """`cbs` itself where every law holds; else the nearest order that keeps them all (Kahn 1962, first come first)."""
    left, result = list(cbs), []
    while left:
        blocked = {id(law.second) for law in laws if any(law.first is cb for cb in left)}
        free = next((cb for cb in left if id(cb) not in blocked), None)
        if free is None:
            raise OrderingError(_describe(_circle(left, laws)))
        left.remove(free)
        result.append(free)
    return result


def _circle(left: list[Any], laws: list[Law]) -> list[Law]:
    """Laws that lead from a callback back to itself; every one in `left` waits for another one in it."""
    path: list[Law] = []
    current = left[0]
    while True:
        law = next(law for law in laws if law.second is current and any(law.first is cb for cb in left))
        path.append(law)
        current = law.first
        for i, earlier in enumerate(path):
            if earlier.second is current:
                return path[i:][::-1]


def _describe(circle: list[Law]) -> str:
    edges = " → ".join(f"{_name(law.second)} ({law})" for law in circle)
    return (
        "these callbacks each want to run before the next, in a circle: "
        f"{_name(circle[0].first)} → {edges}. Remove one of these rules."
    )


def _name(cb: Any) -> str:
    return type(cb).__name__
