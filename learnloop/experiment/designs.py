"""Which callbacks are trained together in a study, and with which training the others are compared."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

__all__ = ["DESIGNS", "Design", "design_of", "interaction_arms"]

DESIGNS = ("add-one-in", "leave-one-out", "pairs")
NONE, ALL = "none", "all"


class Design(NamedTuple):
    """The arms of a study: names of callbacks by the name of the arm. The reference comes first."""

    name: str
    reference: str
    arms: Mapping[str, tuple[str, ...]]


def design_of(name: str, cbs: Sequence[str]) -> Design:
    """The arms that a design makes of callbacks; ValueError for an unknown design, no callback or a name taken."""
    _check(name, cbs)
    singles = {cb: (cb,) for cb in cbs}
    if name == "add-one-in":
        return Design(name, NONE, {NONE: (), **singles})
    if name == "pairs":
        pairs = {pair_name(a, b): (a, b) for a, b in combinations(cbs, 2)}
        return Design(name, NONE, {NONE: (), **singles, **pairs})
    without = {f"without {cb}": tuple(other for other in cbs if other != cb) for cb in cbs}
    return Design(name, ALL, {ALL: tuple(cbs), **without})


def pair_name(a: str, b: str) -> str:
    return f"{a} + {b}"


def interaction_arms(design: Design) -> dict[str, tuple[str, str, str]]:
    """For each pair of callbacks its arm and the arms of each alone."""
    if design.name != "pairs":
        return {}
    return {arm: (arm, *both) for arm, both in design.arms.items() if len(both) == 2}


def _check(name: str, cbs: Sequence[str]) -> None:
    if name not in DESIGNS:
        raise ValueError(f"`design={name!r}`: pass {', '.join(map(repr, DESIGNS[:-1]))} or {DESIGNS[-1]!r}.")
    least = 2 if name == "pairs" else 1
    if len(cbs) < least:
        raise ValueError(f"`cbs` has {len(cbs)} callbacks; the design {name!r} needs {least} or more.")
    taken = [cb for cb in cbs if cb in (NONE, ALL)]
    if taken:
        raise ValueError(f"`cbs` calls a callback {taken[0]!r}, which is the name of an arm. Take another name.")
