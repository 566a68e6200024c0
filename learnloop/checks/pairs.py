"""Two callbacks together: they train, come through cancels and errors, and resume exactly; or are refused at once."""

import io
import math
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from learnloop.checks.case import N_EPOCH, Case
from learnloop.checks.library import callbacks, learner_for, made
from learnloop.checks.promises import STOPS, is_refusal, not_resumed
from learnloop.checks.report import said
from learnloop.checks.scenes import Probe, ProbeError, Scene, survive
from learnloop.checks.traces import changed, equal, traces, traces_after
from learnloop.data.keyed import preserved_randomness
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException

#: What is raised beside a pair, where.
SCENES = (
    Scene("fit", "after_loss", CancelBatchException, math.inf, True),
    Scene("fit", "after_backward", CancelTrainException, -math.inf, None),
    Scene("fit", "before_validate", CancelEpochException, math.inf, None),
    Scene("fit", "before_step", CancelFitException, math.inf, None),
    Scene("fit", "after_loss", ProbeError, math.inf, True),
    Scene("fit", "before_validate", ProbeError, math.inf, None),
)


class Pair(NamedTuple):
    """What was found about two callbacks."""

    names: tuple[str, str]
    refusal: str | None = None  # why they cannot work together
    broken: dict[str, list[str]] = {}  # what -> where  # noqa: RUF012

    def __str__(self) -> str:
        title = " and ".join(self.names)
        if self.refusal is not None:
            return f"{title}: refused: {self.refusal}"
        return f"{title}: " + ("; ".join(f"{what}: {places[0]}" for what, places in self.broken.items()) or "passed")


def all_pairs(names: Any = None) -> list[tuple[str, str]]:
    """Every two public callbacks, and every one with another of its class."""
    return list(combinations_with_replacement(sorted(callbacks() if names is None else names), 2))


def check_pair(one: str, other: str) -> Pair:
    """Checks two callbacks of the library, by name, on one learner."""
    names = one, other
    with preserved_randomness(), redirect_stdout(io.StringIO()), TemporaryDirectory() as folder:
        case = Case(lambda: [made(one), made(other)], partial(learner_for, names), (), Path(folder))
        refusal = _trains(case)
        if refusal is None and case.numbers is not None:
            _has_one_order(case)
            survive(case, list(SCENES))
            for kept in (0, 1):
                _loses_one(case, kept)
            for what, where in not_resumed(case, STOPS[:1]):
                case.breaks(what, where)
    return Pair(names, refusal, case.broken)


def _trains(case: Case) -> str | None:
    learn, cbs = case.learner(), case.subjects()
    found = case.run(lambda: learn.add_cbs(cbs)) or case.fit(learn)
    if not isinstance(found, BaseException):
        case.numbers = found
    elif is_refusal(found, learn):
        return said(found)
    else:
        case.breaks("trains", said(found))
    return None


def _has_one_order(case: Case) -> None:
    found = case.fit(case.learner().add_cbs(case.subjects()[::-1]))
    if isinstance(found, BaseException) or not equal(found, case.numbers):
        case.breaks("gives the same numbers in either order of adding", "not so")


#: Where one of a pair is taken off, by which one is kept.
_TAKEN_OFF = ("after_loss", "before_validate")


def _loses_one(case: Case, kept: int) -> None:
    """One of them is taken off in the middle of a fit, the other one after it."""
    learn, cbs = case.learner(), case.subjects()
    before = traces(learn)
    learn.add_cbs(cbs)
    error = case.run(partial(learn.fit, N_EPOCH, cbs=Probe(_TAKEN_OFF[kept], _taking_off(cbs[1 - kept]), math.inf)))
    if error is not None and not _needs_the_other(case, kept):
        case.breaks("one can be removed", f"{cbs[1 - kept]!r} in {_TAKEN_OFF[kept]}: {said(error)}")
    learn.remove_cbs(cbs)
    for name in changed(before, traces_after(before, learn)):
        case.breaks(f"leaves {name} as it was", f"after {cbs[1 - kept]!r} was removed in {_TAKEN_OFF[kept]}")


def _taking_off(cb: Callback) -> Callable[[Callback], None]:
    def act(probe: Callback) -> None:
        probe.learn.remove_cb(cb)

    return act


def _needs_the_other(case: Case, kept: int) -> bool:
    """Whether the one that is kept cannot train by itself either."""
    alone = case.run(partial(case.learner().add_cb(case.subjects()[kept]).fit, N_EPOCH))
    return alone is not None


def summary(pairs: list[Pair]) -> Iterator[str]:
    """How many there are, how many passed, which were refused and why, and which failed."""
    refused = [pair for pair in pairs if pair.refusal is not None]
    failed = [pair for pair in pairs if pair.broken]
    passed = len(pairs) - len(refused) - len(failed)
    yield f"{len(pairs)} pairs: {passed} passed, {len(refused)} refused, {len(failed)} failed"
    yield from (f"  {pair}" for pair in [*refused, *failed])
