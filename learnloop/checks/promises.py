"""The promises of a callback, and how each is checked: functions that take a case and tell it what is broken."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from learnloop.callbacks.gradients import GradientAccumulation
from learnloop.callbacks.precision import MixedPrecision
from learnloop.checks.case import N_EPOCH, Case
from learnloop.checks.reads import HostReads
from learnloop.checks.report import Verdict, said
from learnloop.checks.scenes import Probe, heard_by, scenes, survive
from learnloop.checks.traces import changed, equal, modes, numbers, outcome, through_a_file, traces, traces_after
from learnloop.data.batches import find_bs
from learnloop.data.keyed import random_states, set_random_states
from learnloop.learner import Learner
from learnloop.loop.callback import Callback, state_attributes
from learnloop.loop.events import EVENTS
from learnloop.loop.state import plain, same


class Promise(NamedTuple):
    """One line of a report; the check returns why it was left out, if it was."""

    title: str
    check: Callable[[Case], str | None]


def kept(case: Case, promises: tuple[Promise, ...]) -> Iterator[Verdict]:
    """A verdict on each; what cannot train is not asked for more."""
    for promise in promises:
        case.broken = {}
        left_out = promise.check(case)
        yield Verdict(promise.title, case.broken, left_out)
        if case.numbers is None:
            return


def _trains(case: Case) -> None:
    learn, cbs = case.learner(), case.subjects()
    found = case.run(lambda: learn.add_cbs(cbs)) or case.fit(learn)
    if isinstance(found, BaseException):
        case.breaks("works in a plain fit", said(found))
    else:
        case.numbers = found


def _survives(case: Case) -> None:
    """Whatever is raised beside it, the learner is left clean and trains again with the same numbers."""
    heard = heard_by(case.subjects())
    for (_, event, _), group in groupby(scenes(heard), key=lambda scene: (scene.run, scene.event, scene.training)):
        if event in case.events:  # event by event: callbacks that gather something must not slow it down
            survive(case, list(group))


# Taken off


#: Where a callback is taken off in the middle of a fit.
REMOVALS = (("after a fit", None), ("in a batch", "after_loss"), ("in a phase", "before_validate"))


def _is_removable(case: Case) -> None:
    """Taken off after a fit or in the middle of one, it leaves nothing."""
    for where, event in REMOVALS:
        learn, cbs = case.learner(), case.subjects()
        before = traces(learn)
        learn.add_cbs(cbs)
        probes = [] if event is None else [Probe(event, partial(_remove, cbs), math.inf)]
        error = case.run(partial(learn.fit, N_EPOCH, cbs=probes))
        if error is not None and type(error) is not type(case.without):  # which needs it in order to train at all
            case.breaks("can be removed", f"{where}: {said(error)}")
        learn.remove_cbs(cbs)
        for what in _left_on(learn, before, case):
            case.breaks(what, f"removed {where}")


def _remove(cbs: list[Callback], probe: Callback) -> None:
    probe.learn.remove_cbs(cbs)


def _left_on(learn: Learner, before: dict[str, Any], case: Case) -> Iterator[str]:
    """What a removed callback left on a learner, which a learner that never had it does not show."""
    for name in changed(before, traces_after(before, learn)):
        yield f"leaves {name} as it was"
    for name in sorted({*vars(learn)} - case.known):
        yield f"leaves no `learn.{name}` behind"
    if modes(learn) != modes(case.control):
        yield "leaves the model in the mode of a fit without it"


# Stored and resumed


def _is_storable(case: Case) -> None:
    """What it needs to go on is in its state, which a file can hold and another instance takes over."""
    learn, cbs, other, heirs = case.learner(), case.subjects(), case.learner(), case.subjects()
    case.fit(learn.add_cbs(cbs))
    for cb in cbs:
        if type(cb).state_dict is Callback.state_dict:
            for name in {*state_attributes(type(cb))} - {*vars(cb)}:
                case.breaks("has every attribute that its `_stateattrs` name", f"no `{name}` after a fit")
    error = case.run(lambda: other.add_cbs(heirs).load_state_dict(through_a_file(learn.state_dict())))
    if error is not None:
        case.breaks("its state can be stored and loaded", said(error))
        return
    for cb, heir in zip(cbs, heirs, strict=True):
        state, found = cb.state_dict(), heir.state_dict()
        for name in state:
            if name not in found or not equal(plain(state[name]), plain(found[name])):
                case.breaks("its state survives being stored and loaded", f"`{name}` differs")


#: Where a fit is stopped: in the middle of the second epoch's training, in its validation, between two epochs.
STOPS = (
    ("in training", "after_batch", True, 3),
    ("in a validation", "after_batch", False, 2),
    ("between two epochs", "after_epoch", None, 1),
)


def _resumes(case: Case) -> None:
    """A fit that is stopped and resumed by a learner made anew ends as if it had not been stopped."""
    for what, where in not_resumed(case, STOPS):
        case.is_resumable = False
        case.breaks(what, where)


def not_resumed(
    case: Case, stops: tuple[Any, ...], beside: Callable[[], list[Callback]] = list
) -> Iterator[tuple[str, str]]:
    """What is broken where a fit is stopped at these places and resumed, with other callbacks beside it."""
    learn = case.learner().add_cbs([*case.subjects(), *beside()])
    case.run(partial(learn.fit, N_EPOCH))
    whole = outcome(learn)
    for where, event, training, hearing in stops:
        learn = case.learner().add_cbs([*case.subjects(), *beside()])
        probe = Probe(event, _stop, math.inf, hearing, training)
        case.run(partial(learn.fit, N_EPOCH, cbs=probe), KeyboardInterrupt)
        if learn._point is None:  # a callback ended the fit before
            continue
        learn.remove_cb(probe)
        error, found = case.resumed(through_a_file(learn.state_dict()), beside())
        if error is not None:
            yield "can be resumed by a learner made anew", f"stopped {where}: {said(error)}"
        elif not equal(found, whole):
            yield "ends with the same numbers when it is resumed by a learner made anew", f"stopped {where}"


def _stop(probe: Callback) -> None:
    probe.learn._stop_requested = True  # as a first Ctrl-C does


# Beside others


def _has_a_place(case: Case) -> None:
    """Where it stands among the learner's callbacks, and what a fit gives, does not depend on when it was added."""
    last, first = case.learner(), case.learner()
    others = list(first.cbs)
    last.add_cbs(case.subjects())
    first.remove_cbs(others).add_cbs([*case.subjects(), *others])
    for event in EVENTS:
        orders = [[type(cb).__name__ for cb in learn.ordered_cbs(event)] for learn in (first, last)]
        if orders[0] != orders[1]:
            where = f"in {event}, {' '.join(orders[0])} if it is added first, {' '.join(orders[1])} if last"
            case.breaks("stands in one place among the learner's callbacks", where)
    if not case.broken and not equal(case.fit(first), case.numbers):
        case.breaks("gives the same numbers wherever it is added", "added before the learner's other callbacks")


def _goes_beside(make: Callable[[Learner], Callback], kind: type[Callback], case: Case) -> str | None:
    """Trains beside another callback, or refuses it before the first batch; and resumes exactly."""
    subjects = case.subjects()
    if any(isinstance(cb, kind) for cb in subjects):
        return "is one itself"
    if not any("fit" in cb.tasks for cb in subjects):
        return "takes no part in training"
    learn = case.learner()
    if any(isinstance(cb, kind) for cb in learn.cbs):
        return "the learner has it already"
    other = partial(make, learn)
    error = case.run(lambda: learn.add_cbs([*subjects, other()])) or case.run(partial(learn.fit, N_EPOCH))
    if is_refusal(error, learn):
        return f"refused: {said(error)}"
    if error is not None:
        case.breaks(f"trains beside {kind.__name__}", said(error))
    elif not all(map(math.isfinite, numbers(learn))) and all(map(math.isfinite, case.numbers or ())):
        case.breaks(f"trains beside {kind.__name__}", "losses or weights become infinite or no number")
    elif case.is_resumable:
        for what, where in not_resumed(case, STOPS[:1], lambda: [other()]):
            case.breaks(what, f"beside {kind.__name__}, {where}")
    return None


def is_refusal(error: BaseException | None, learn: Learner) -> bool:
    """Whether callbacks that do not go together were refused when they were added, or before the first batch."""
    return isinstance(error, (TypeError, ValueError)) and learn.iter is None


def _in_bf16(learn: Learner) -> Callback:
    return MixedPrecision("bf16")


def _over_two_batches(learn: Learner) -> Callback:
    first = next(iter(learn.dls.train), None)
    return GradientAccumulation(2 * max(1, find_bs(first)))


# What it costs and claims


def _only_reads(case: Case) -> str | None:
    cbs = case.subjects()
    if not all(cb.reads_only for cb in cbs):
        return "does not say so"
    found = []
    for joining in ([], cbs):
        learn = case.learner().add_cbs(joining)
        set_random_states(case.random)
        case.run(partial(learn.fit, N_EPOCH))
        found.append((numbers(learn), plain(random_states())))
    if not equal(found[0][0], found[1][0]):
        case.breaks("moves no loss and no weight", "a fit without it gives others")
    if not same(found[0][1], found[1][1]):
        case.breaks("moves no random state", "after a fit without it they are others")
    return None


def _reads_counted(case: Case) -> None:
    """Beyond those that the learner makes without it."""
    found = []
    for joining in ([], case.subjects()):
        learn, reads = case.learner().add_cbs(joining), HostReads()
        set_random_states(case.random)
        with reads:
            case.run(partial(learn.fit, N_EPOCH, cbs=reads))
        found.append(reads.per_batch)
    case.host_reads = round(max(0.0, found[1] - found[0]), 3)


PROMISES = (
    Promise("trains", _trains),
    Promise("leaves all clean after any cancel and error", _survives),
    Promise("is removed without a trace", _is_removable),
    Promise("can be stored", _is_storable),
    Promise("resumes exactly", _resumes),
    Promise("has one place in the order", _has_a_place),
    Promise("works in mixed precision", partial(_goes_beside, _in_bf16, MixedPrecision)),
    Promise("works with accumulated gradients", partial(_goes_beside, _over_two_batches, GradientAccumulation)),
    Promise("only reads", _only_reads),
)


def checked(case: Case) -> tuple[Verdict, ...]:
    """A verdict on every promise, and the host reads counted."""
    verdicts = tuple(kept(case, PROMISES))
    if case.numbers is not None:
        case.broken = {}
        _reads_counted(case)
    return verdicts
