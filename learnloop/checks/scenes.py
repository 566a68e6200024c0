"""Scenes: something is raised beside a callback, at one event of a run, and the learner has to come through."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from learnloop.checks.case import N_EPOCH, Case
from learnloop.checks.report import said
from learnloop.checks.traces import attributes_with, changed, equal, modes, tensors_of, traces, traces_after, train_mode
from learnloop.loop.callback import Callback, handled_events
from learnloop.loop.cancel import CancelException
from learnloop.loop.events import BATCH_EVENTS, EVENTS
from learnloop.loop.spans import SPANS

#: Events at which something can be raised in a run.
HEARD = tuple(n for n in EVENTS if n != "after_create" and not n.startswith("cleanup_"))
_CANCELS = {span.name: span.cancel for span in SPANS}
_IN_TRAINING = [n for n in HEARD if n.endswith(("_backward", "_step", "_train"))]
_IN_BOTH = [n for n in BATCH_EVENTS if n not in _IN_TRAINING]


class ProbeError(Exception):
    """The plain error of a check."""


class Probe(Callback):
    """Acts once, at a hearing of an event that is counted from 1, before (-inf) or after (inf) everyone else."""

    def __init__(
        self, event: str, act: Callable[[Callback], Any], order: float, hearing: int = 1, training: bool | None = None
    ):
        setattr(self, event, self._hear)
        self.act, self.order, self.left, self.phase = act, order, hearing, training

    def _hear(self) -> None:
        if self.phase in (None, self.learn.training):
            self.left -= 1
            if self.left == 0:
                self.act(self)


def _raising(error: type[Exception]) -> Callable[[Callback], None]:
    def act(probe: Callback) -> None:
        raise error("raised by a check")

    return act


class Scene(NamedTuple):
    """What is raised, where, and on which side of the callback."""

    run: str  # 'fit' or 'validate'
    event: str
    error: type[Exception]
    order: float
    training: bool | None  # the phase, where the event belongs to both

    def __str__(self) -> str:
        phase = {True: " of training", False: " of validation", None: ""}[self.training]
        side = "before" if self.order < 0 else "after"
        return f"{self.run} with {self.error.__name__} in {self.event}{phase}, raised {side} it"

    def probes(self) -> list[Probe]:
        """Callbacks that raise it, at the second hearing where there is one: something must have been going on."""
        hearing = 1 if self.run == "validate" or self.event.endswith("_fit") else 2
        span = self.event.removeprefix("after_cancel_")
        if span == self.event:
            return [Probe(self.event, _raising(self.error), self.order, hearing, self.training)]
        return [
            Probe(f"before_{span}", _raising(_CANCELS[span]), math.inf, hearing, self.training),
            Probe(self.event, _raising(self.error), self.order, 1, self.training),
        ]


def scenes(heard: set[str] = frozenset(HEARD)) -> Iterator[Scene]:  # type: ignore[assignment]
    """Every cancel and an error at every event; on both sides where it is one of those `heard`: else they are alike."""
    for run, training, events in (
        ("fit", None, [n for n in HEARD if n not in _IN_BOTH]),
        ("fit", True, _IN_BOTH),
        ("fit", False, _IN_BOTH),
        ("validate", None, [n for n in HEARD if n not in _IN_TRAINING]),
    ):
        for event in events:
            for error in (*_CANCELS.values(), ProbeError):
                if event in heard:
                    yield Scene(run, event, error, -math.inf, training)
                yield Scene(run, event, error, math.inf, training)


def heard_by(cbs: list[Callback]) -> set[str]:
    """Events that one of them hears."""
    calls = any(type(cb).__call__ is not Callback.__call__ for cb in cbs)
    return {*HEARD} if calls else set().union(*map(handled_events, cbs))


def survive(case: Case, group: list[Scene]) -> None:
    """Plays scenes on one learner. What one leaves shows in the fits that follow, so only some are followed by one.

    Where anything is found, they are played again, each followed by a fit, to say by which it is left.
    """
    bench = Bench(case)
    if not any(bench.broken_by(scene, fits_again=scene.error is ProbeError) for scene in group):
        return
    bench, case.is_leaking = Bench(case), False
    for scene in group:
        broken = bench.broken_by(scene, fits_again=True)
        for what in broken:
            case.breaks(what, str(scene))
        if broken:
            bench = Bench(case)  # what is broken must not be counted again in every later scene


class Bench:
    """One learner with the callback, disturbed in scene after scene."""

    def __init__(self, case: Case):
        self.case, self.subjects = case, case.subjects()
        self.learn = case.learner().add_cbs(self.subjects)
        self.start = {name: t.clone() for name, t in tensors_of(self.learn).items()}
        self.traces = traces(self.learn)
        case.fit(self.learn)
        self.attributes = {*vars(self.learn), *case.known}
        self._rewind()

    def _rewind(self) -> None:
        for name, tensor in tensors_of(self.learn).items():
            tensor.data.copy_(self.start[name])
        for p in self.learn._parameters():
            p.grad = None  # a cancelled batch leaves gradients on purpose

    def broken_by(self, scene: Scene, fits_again: bool) -> list[str]:
        """Disturbs a run, and looks at what it left; after a fit, also by fitting again."""
        train_mode(self.learn)
        broken = [*self._disturbed(scene), *self._left_behind(), *self._kept_alive()]
        if scene.run == "validate" and not all(modes(self.learn)):
            broken.append("`validate` leaves the mode of the model as it was")
        elif scene.run == "fit" and fits_again:
            broken += self._second_fit()
        self._rewind()
        return broken

    def _disturbed(self, scene: Scene) -> Iterator[str]:
        self.watch = _Watch()
        probes = scene.probes()
        run = partial(self.learn.fit, N_EPOCH) if scene.run == "fit" else self.learn.validate
        error = self.case.run(partial(run, cbs=[*probes, self.watch]))
        if scene.error is ProbeError and probes[-1].left < 1 and type(error) is not ProbeError:
            yield f"lets an error of someone else pass: {said(error)} came out"
        elif error is not None and not isinstance(error, (ProbeError, CancelException)):
            yield f"raises nothing where others cancel: {said(error)}"
        for note in getattr(error, "__notes__", ()):
            if note.startswith("also raised"):
                yield f"raises nothing in a cleanup: {note.removeprefix('also raised: ').partition(' (raised by')[0]}"

    def _left_behind(self) -> Iterator[str]:
        for name in changed(self.traces, traces_after(self.traces, self.learn)):
            yield f"leaves {name} as it was"
        for name in sorted({*vars(self.learn)} - self.attributes):
            yield f"leaves no `learn.{name}` behind"

    def _kept_alive(self) -> Iterator[str]:
        held = [*self._held(lambda t: t.grad_fn is not None, "graph")]
        for kind, ids in self.watch.alive().items():
            held += self._held(partial(_is_one_of, ids), f"`{kind}` of a batch")
        yield from held
        if self.watch.alive() and not held and not self.case.is_leaking:
            gc.collect()  # takes long, so only for what nothing else explains, and not again once something is found
            for kind in self.watch.alive():
                self.case.is_leaking = True
                yield f"keeps no `{kind}` of a batch alive"

    def _held(self, is_meant: Callable[[Tensor], bool], what: str) -> Iterator[str]:
        for cb in self.subjects:
            for name in attributes_with(cb, is_meant):
                yield f"keeps no {what} in `{name}`"

    def _second_fit(self) -> Iterator[str]:
        self._rewind()
        found = self.case.fit(self.learn)
        if isinstance(found, BaseException):
            yield f"can be fitted again: {said(found)}"
        elif not equal(found, self.case.numbers):
            yield "trains again with the numbers of a first fit"


def _is_one_of(ids: set[int], tensor: Tensor) -> bool:
    return id(tensor) in ids


class _Watch(Callback):
    """Remembers the tensors of every batch without keeping them alive."""

    order = -1e9

    def __init__(self) -> None:
        self.seen: list[tuple[str, weakref.ref[Tensor]]] = []

    def before_batch(self) -> None:
        self._see("xb", self.learn.xb)
        self._see("yb", self.learn.yb)

    def after_loss(self) -> None:
        self._see("pred", (self.learn.pred,))

    def _see(self, kind: str, values: Any) -> None:
        self.seen += [(kind, weakref.ref(v)) for v in values if isinstance(v, Tensor)]

    def alive(self) -> dict[str, set[int]]:
        """The ids of tensors that are still there, by what they were."""
        found: dict[str, set[int]] = {}
        for kind, ref in self.seen:
            tensor = ref()
            if tensor is not None:
                found.setdefault(kind, set()).add(id(tensor))
        return found
