"""Everything that is worth knowing before hours are spent: checks of a learner, of which nothing stays."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from learnloop.data.keyed import preserved_randomness
from learnloop.insight import data_checks, model_checks
from learnloop.insight.findings import FAILED, NOT_APPLICABLE, CheckReport, Finding, NotApplicable
from learnloop.insight.subject import Subject
from learnloop.loop.dispatch import listed
from learnloop.loop.state import capture, restore

#: By name, the cheap ones first.
CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "loss at start": model_checks.loss_at_start,
    "outputs fit the loss": model_checks.outputs_fit_the_loss,
    "gradients": model_checks.gradients,
    "modes": model_checks.modes,
    "samples apart": model_checks.samples_apart,
    "evaluation repeats": data_checks.evaluation_repeats,
    "shuffled": data_checks.shuffled,
    "no leak": data_checks.no_leak,
    "loader speed": data_checks.loader_speed,
    "one batch": model_checks.one_batch,
    "learning": data_checks.learning,
}


def check(learn: Any, only: Any = None, skip: Any = (), seconds: float = 10.0) -> CheckReport:
    """Runs the checks one after the other, each by itself; nothing of the learner changes."""
    if learn.task is not None:
        raise RuntimeError("`check` was called while a run is active. Call it before or after that run.")
    wanted = [n for n in CHECKS if n in (_known(only) or CHECKS) and n not in _known(skip)]
    start = time.perf_counter()
    with as_it_was(learn):
        subject = Subject(learn, seconds)
        found = {name: _found(CHECKS[name], subject) for name in wanted}
    return CheckReport(found, time.perf_counter() - start)


def _known(names: Any) -> list[str]:
    for name in listed(names):
        if name not in CHECKS:
            near = get_close_matches(str(name), CHECKS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no check {name!r}; there is {', '.join(map(repr, CHECKS))}.{hint}")
    return listed(names)


def _found(check: Callable[[Subject], Finding], subject: Subject) -> Finding:
    try:
        return check(subject)
    except NotApplicable as reason:
        return Finding(NOT_APPLICABLE, str(reason))
    except Exception as error:  # the other checks are worth having all the same
        return Finding(FAILED, f"{type(error).__name__}: {error}", error=error)


@contextmanager
def as_it_was(learn: Any) -> Iterator[None]:
    """A context after which the learner is as it was before it, to the bit."""
    names = set(learn.__dict__)
    with learn.removed_cbs([cb for cb in learn.cbs if cb.reads_only]), preserved_randomness():
        state = capture(learn)
        try:
            yield
        finally:
            restore(learn, state)
            for name in set(learn.__dict__) - names:
                del learn.__dict__[name]
