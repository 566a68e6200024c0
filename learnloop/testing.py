"""For tests and lessons: a tiny learner, a log of events, and a check of what a callback promises."""

import difflib
import gc
import io
import math
import random
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from fastcore.basics import noop
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop.callbacks.modes import TrainEvalCallback
from learnloop.callbacks.recorder import Recorder
from learnloop.data.batches import to_detach
from learnloop.data.keyed import preserved_randomness, random_states, set_random_states
from learnloop.data.loaders import DataLoaders, TensorLoader
from learnloop.learner import Learner
from learnloop.loop.callback import Callback, state_attributes
from learnloop.loop.cancel import CancelException
from learnloop.loop.dispatch import instances
from learnloop.loop.events import BATCH_EVENTS, EVENTS, unknown_event
from learnloop.loop.spans import SPANS
from learnloop.loop.state import plain
from learnloop.optim.algorithms import SGD

__all__ = ["CallbackReport", "EventLog", "check_callback", "toy_learner"]


# A tiny learner


def toy_learner(
    n_train: int = 32,  # training samples
    n_valid: int = 16,  # validation samples; 0: no validation loader
    bs: int = 8,
    model: Any = None,  # takes (bs, 2), returns (bs, 1); None: two linear layers
    cbs: Any = None,  # beside TrainEvalCallback and Recorder
    **learner_kwargs: Any,
) -> Learner:
    """A learner for a regression, trained in milliseconds on the CPU, with the same numbers every time.

    It prints nothing: there is no ProgressCallback, and `logger` takes rows without showing them. Making it moves no
    random generator.
    """
    options = {"loss_func": nn.MSELoss(), "opt_func": SGD, "lr": 0.1, "default_cbs": False, **learner_kwargs}
    quiet = [] if "default_cbs" in learner_kwargs else [TrainEvalCallback(), Recorder()]
    learn = Learner(
        _toy_loaders(n_train, n_valid, bs), _toy_model() if model is None else model, cbs=[*quiet, *L(cbs)], **options
    )
    learn.logger, learn.create_mbar = noop, False
    return learn


def _toy_loaders(n_train: int, n_valid: int, bs: int) -> DataLoaders:
    valid = [TensorLoader(*_toy_data(n_valid, 0.9), bs=bs)] if n_valid else []
    dls = DataLoaders(TensorLoader(*_toy_data(n_train, 1.0), bs=bs, shuffle=True), *valid, device="cpu")
    dls.seed = 42
    return dls


def _toy_data(n: int, reach: float) -> tuple[Tensor, Tensor]:
    t = torch.linspace(-reach, reach, n)[:, None]
    return torch.cat([t, t**2], 1), 2 * t - t**2 + 0.5


def _toy_model() -> nn.Module:
    with preserved_randomness():
        torch.manual_seed(42)
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


# A log of events


class EventLog(Callback):
    """Notes the events it hears in `events`: names, or tuples of name and values with `EventLog("epoch", "iter")`."""

    reads_only = True

    def __init__(
        self,
        *attributes: str,  # of the learner, read at each event; None where it has none
        cleanups: bool = True,  # note the cleanups too
        order: float = 0,
    ):
        self.attributes, self.cleanups, self.order = attributes, cleanups, order
        self.events: list[Any] = []

    def __call__(self, event_name: str) -> None:
        if self.cleanups or not event_name.startswith("cleanup_"):
            values = [to_detach(getattr(self.learn, n, None), cpu=False) for n in self.attributes]
            self.events.append((event_name, *values) if values else event_name)

    def check(self, expected: str | Sequence[Any]) -> None:
        """Compares `events` with a list, or with names in a string; AssertionError that shows the difference."""
        wanted = expected.split() if isinstance(expected, str) else list(expected)
        if self.events != wanted:
            before, now = [str(e) for e in wanted], [str(e) for e in self.events]
            difference = difflib.unified_diff(before, now, "expected", "heard", lineterm="", n=2)
            raise AssertionError("other events than expected:\n" + "\n".join(difference))


# A check of a callback


#: Events at which something can be raised in a run.
HEARD = tuple(n for n in EVENTS if n != "after_create" and not n.startswith("cleanup_"))


def check_callback(
    make: Callable[[], Callback],  # a class, or a function without arguments that makes one
    make_learner: Callable[[], Learner] | None = None,  # whose loaders make new tensors for each batch; None: a toy
    events: Sequence[str] = HEARD,  # at which something is raised
) -> "CallbackReport":
    """Checks that a callback keeps the promises of the loop; AssertionError that names every one it breaks.

    Every cancel and an error are raised before and after it at every event, in training and in validation. The learner
    must be left clean and train again with the same numbers. The callback must leave no trace when it is removed, its
    state must survive being stored, and a fit that is stopped in the middle and resumed by a learner made anew, with
    other weights to begin with, must end with the same numbers. Takes a second or two with the toy learner.
    """
    if not callable(make) or isinstance(make, Callback):
        raise TypeError(f"`{make!r}` makes no callback; pass the class, or a function that makes one.")
    for name in {*events} - {*HEARD}:
        raise ValueError(unknown_event(name))
    began = time.perf_counter()
    with preserved_randomness(), redirect_stdout(io.StringIO()), TemporaryDirectory() as folder:
        case = _Case(make, make_learner or _small_toy, events, Path(folder))
        for check in CHECKS:
            check(case)
            if case.cannot_train:
                break
    report = CallbackReport(case.name, case.n_runs, time.perf_counter() - began, case.broken)
    if report.broken:
        raise AssertionError(str(report))
    return report


@dataclass(frozen=True, repr=False)
class CallbackReport:
    """What `check_callback` found."""

    callback: str  # its class
    n_runs: int  # fits and validations that were run
    seconds: float
    broken: dict[str, list[str]]  # promise -> where it was broken

    def __str__(self) -> str:
        runs = f"({self.n_runs} runs, {self.seconds:.1f} s)"
        if not self.broken:
            return f"{self.callback} keeps every promise {runs}"
        lines = [f"  - {promise}: {_shortened(places)}" for promise, places in self.broken.items()]
        return "\n".join([f"{self.callback} breaks {len(self.broken)} promises {runs}:", *lines])

    def __repr__(self) -> str:
        return str(self)


def _shortened(places: list[str]) -> str:
    more = f"; and {len(places) - 3} more" if len(places) > 3 else ""
    return "; ".join(places[:3]) + more


def _small_toy() -> Learner:
    return toy_learner(n_train=16, n_valid=8)


N_EPOCH = 2  # of a fit that is disturbed: something must have been going on before


class _Case:
    """One callback under check: learners with it, the numbers of a plain fit, and what it broke so far."""

    name = "?"

    def __init__(
        self, make: Callable[[], Callback], make_learner: Callable[[], Learner], events: Sequence[str], folder: Path
    ):
        self.make, self.make_learner, self.events, self.folder = make, make_learner, events, folder
        self.random = _seeded_states()
        self.n_runs = 0
        self.cannot_train = self.is_leaking = False
        self.broken: dict[str, list[str]] = {}
        self.numbers: list[float] = []  # losses and weights of a plain fit
        self.control = self.learner()  # one that never had it, after a fit
        self.fit(self.control)

    def learner(self) -> Learner:
        """A learner without the callback, the same every time."""
        set_random_states(self.random)
        learn = self.make_learner()
        learn.path = self.folder
        return learn

    def subject(self) -> Callback:
        """A new instance of the callback."""
        cb = instances(self.make())[0]
        self.name = type(cb).__name__
        return cb

    def breaks(self, promise: str, where: str) -> None:
        self.broken.setdefault(promise, []).append(where)

    def run(self, run: Callable[[], Any], also: type[BaseException] = Exception) -> BaseException | None:
        """Runs something; an exception comes back without its frames, which would keep the batch."""
        self.n_runs += 1
        try:
            run()
        except (Exception, also) as error:
            return error.with_traceback(None)
        return None

    def resumed(self, state: dict[str, Any]) -> tuple[BaseException | None, list[Any]]:
        """What was raised and what came out where a new learner with a new instance goes on from a state."""
        learn, subject = self.learner(), self.subject()
        for p in learn._parameters():
            p.data.neg_()  # what is taken from the weights before the state is there shows
        error = self.run(lambda: learn.add_cb(subject).load_state_dict(state)) or self.run(learn.resume)
        return error, _outcome(learn)

    def fit(self, learn: Learner) -> list[float] | BaseException:
        """Trains from the learner's weights for one epoch; returns losses and weights, or what was raised."""
        set_random_states(self.random)
        error = self.run(partial(learn.fit, 1, reset_opt=True))
        return _numbers(learn) if error is None else error


def _seeded_states() -> dict[str, Any]:
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    return random_states()


def _numbers(learn: Learner) -> list[float]:
    return learn._kept.since(0) + [x for p in learn._parameters() for x in p.detach().flatten().tolist()]


# The checks: each takes a case and tells it what is broken


def _check_plain_fit(case: _Case) -> None:
    """It works at all."""
    learn, subject = case.learner(), case.subject()
    found = case.run(lambda: learn.add_cb(subject)) or case.fit(learn)
    if isinstance(found, BaseException):
        case.cannot_train = True
        case.breaks("works in a plain fit", repr(found))
    else:
        case.numbers = found


def _check_cancels_and_errors(case: _Case) -> None:
    """Whatever is raised beside it, the learner is left clean and trains again with the same numbers."""
    for (_, event, _), scenes in groupby(_scenes(), key=lambda scene: (scene.run, scene.event, scene.training)):
        if event in case.events:
            bench = _Bench(case)  # a new one for each event: callbacks that gather something must not slow it down
            for scene in scenes:
                if not bench.survives(scene):
                    bench = _Bench(case)  # what is broken must not be counted again in every later scene


def _check_removal(case: _Case) -> None:
    """Taken off after a fit or in the middle of one, it leaves nothing."""
    for where, event in (("after a fit", None), ("in a batch", "after_loss"), ("in a phase", "before_validate")):
        learn, subject = case.learner(), case.subject()
        before = _traces(learn)
        learn.add_cb(subject)
        cbs = [] if event is None else [_Probe(event, partial(_remove, subject), math.inf)]
        error = case.run(partial(learn.fit, N_EPOCH, cbs=cbs))
        if error is not None:
            case.breaks("can be removed", f"{where}: {error!r}")
        learn.remove_cb(subject)
        for promise in _left_on(learn, before, case.control):
            case.breaks(promise, f"removed {where}")


def _remove(subject: Callback, probe: Callback) -> None:
    probe.learn.remove_cb(subject)


def _left_on(learn: Learner, before: dict[str, Any], control: Learner) -> Iterator[str]:
    """What a removed callback left on a learner, which a learner that never had it does not show."""
    for name in _changed(before, _traces(learn)):
        yield f"leaves {name} as it was"
    for name in sorted({*vars(learn)} - {*vars(control)}):
        yield f"leaves no `learn.{name}` behind"
    if _modes(learn) != _modes(control):
        yield "leaves the model in the mode of a fit without it"


def _check_state(case: _Case) -> None:
    """What it needs to go on is in its state, which a file can hold and another instance takes over."""
    learn, subject, other, heir = case.learner(), case.subject(), case.learner(), case.subject()
    case.fit(learn.add_cb(subject))
    if type(subject).state_dict is Callback.state_dict:
        for name in {*state_attributes(type(subject))} - {*vars(subject)}:
            case.breaks("has every attribute that its `_stateattrs` name", f"no `{name}` after a fit")
    error = case.run(lambda: other.add_cb(heir).load_state_dict(_through_a_file(learn.state_dict())))
    if error is not None:
        case.breaks("its state can be stored and loaded", repr(error))
        return
    kept, found = subject.state_dict(), heir.state_dict()
    for name in kept:
        if name not in found or not _equal(plain(kept[name]), plain(found[name])):
            case.breaks("its state survives being stored and loaded", f"`{name}` differs")


def _check_resume(case: _Case) -> None:
    """A fit that is stopped and resumed by a learner made anew ends as if it had not been stopped."""
    learn, subject = case.learner(), case.subject()
    case.run(partial(learn.add_cb(subject).fit, N_EPOCH))
    whole = _outcome(learn)
    for where, event, training, hearing in STOPS:
        learn, subject = case.learner(), case.subject()
        probe = _Probe(event, _stop, math.inf, hearing, training)
        case.run(partial(learn.add_cb(subject).fit, N_EPOCH, cbs=probe), KeyboardInterrupt)
        if learn._point is None:  # the callback ended the fit before
            continue
        learn.remove_cb(probe)
        error, found = case.resumed(_through_a_file(learn.state_dict()))
        if error is not None:
            case.breaks("can be resumed by a learner made anew", f"stopped {where}: {error!r}")
        elif not _equal(found, whole):
            case.breaks("ends with the same numbers when it is resumed by a learner made anew", f"stopped {where}")


#: Where a fit is stopped: in the middle of the second epoch's training, in its validation, between two epochs.
STOPS = (
    ("in training", "after_batch", True, 3),
    ("in a validation", "after_batch", False, 2),
    ("between two epochs", "after_epoch", None, 1),
)


def _stop(probe: Callback) -> None:
    probe.learn._stop_requested = True  # as a first Ctrl-C does


def _outcome(learn: Learner) -> list[Any]:
    """Losses, weights and the record's rows."""
    recorder = learn.__dict__.get("recorder")
    return [_numbers(learn), [] if recorder is None else [list(row) for row in recorder.values]]


CHECKS: tuple[Callable[[_Case], None], ...] = (
    _check_plain_fit,
    _check_cancels_and_errors,
    _check_removal,
    _check_state,
    _check_resume,
)


# Something raised beside a callback


class _ProbeError(Exception):
    """The plain error of a check."""


class _Probe(Callback):
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


class _Scene(NamedTuple):
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

    def probes(self) -> list[_Probe]:
        """Callbacks that raise it, at the second hearing where there is one: something must have been going on."""
        hearing = 1 if self.run == "validate" or self.event.endswith("_fit") else 2
        span = self.event.removeprefix("after_cancel_")
        if span == self.event:
            return [_Probe(self.event, _raising(self.error), self.order, hearing, self.training)]
        return [
            _Probe(f"before_{span}", _raising(_CANCELS[span]), math.inf, hearing, self.training),
            _Probe(self.event, _raising(self.error), self.order, 1, self.training),
        ]


_CANCELS = {span.name: span.cancel for span in SPANS}


def _scenes() -> Iterator[_Scene]:
    for run, training, events in (
        ("fit", None, [n for n in HEARD if n not in _IN_BOTH]),
        ("fit", True, _IN_BOTH),
        ("fit", False, _IN_BOTH),
        ("validate", None, [n for n in HEARD if n not in _IN_TRAINING]),
    ):
        for event in events:
            for error in (*_CANCELS.values(), _ProbeError):
                yield _Scene(run, event, error, -math.inf, training)
                yield _Scene(run, event, error, math.inf, training)


_IN_TRAINING = [n for n in HEARD if n.endswith(("_backward", "_step", "_train"))]
_IN_BOTH = [n for n in BATCH_EVENTS if n not in _IN_TRAINING]


class _Bench:
    """One learner with the callback, disturbed in scene after scene as long as it comes through unharmed."""

    def __init__(self, case: _Case):
        self.case, self.subject = case, case.subject()
        self.learn = case.learner().add_cb(self.subject)
        self.start = {name: t.clone() for name, t in _tensors(self.learn).items()}
        self.traces = _traces(self.learn)
        case.fit(self.learn)
        self.attributes = {*vars(self.learn), *vars(case.control)}
        self._rewind()

    def _rewind(self) -> None:
        for name, tensor in _tensors(self.learn).items():
            tensor.data.copy_(self.start[name])
        for p in self.learn._parameters():
            p.grad = None  # a cancelled batch leaves gradients on purpose

    def survives(self, scene: _Scene) -> bool:
        """Disturbs a run, looks at what it left, and after a fit fits again."""
        _train_mode(self.learn)
        broken = [*self._disturbed(scene), *self._left_behind(), *self._kept_alive()]
        if scene.run == "fit":
            broken += self._second_fit()
        elif not all(_modes(self.learn)):
            broken.append("`validate` leaves the mode of the model as it was")
        self._rewind()
        for promise in broken:
            self.case.breaks(promise, str(scene))
        return not broken

    def _disturbed(self, scene: _Scene) -> Iterator[str]:
        self.watch = _Watch()
        probes = scene.probes()
        run = partial(self.learn.fit, N_EPOCH) if scene.run == "fit" else self.learn.validate
        error = self.case.run(partial(run, cbs=[*probes, self.watch]))
        if scene.error is _ProbeError and probes[-1].left < 1 and type(error) is not _ProbeError:
            yield f"lets an error of someone else pass: {error!r} came out"
        elif error is not None and not isinstance(error, (_ProbeError, CancelException)):
            yield f"raises nothing where others cancel: {error!r}"
        for note in getattr(error, "__notes__", ()):
            if note.startswith("also raised"):
                yield f"raises nothing in a cleanup: {note.removeprefix('also raised: ')}"

    def _left_behind(self) -> Iterator[str]:
        for name in _changed(self.traces, _traces(self.learn)):
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
        for name in _attributes_with(self.subject, is_meant):
            yield f"keeps no {what} in `{name}`"

    def _second_fit(self) -> Iterator[str]:
        self._rewind()
        found = self.case.fit(self.learn)
        if isinstance(found, BaseException):
            yield f"can be fitted again: {found!r}"
        elif not _equal(found, self.case.numbers):
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


# What a callback can leave on a learner


def _traces(learn: Learner) -> dict[str, Any]:
    """Everything that a run and a callback must leave as it was, by the name that a report gives it."""
    settings = ("model", "loss_func", "logger", "dls", "opt_func", "splitter", "path", "create_mbar", "run", "task")
    return {
        **{f"`learn.{name}`": learn.__dict__.get(name) for name in settings},
        "`learn.metrics`": [id(m) for m in learn.metrics],
        "`learn.cbs`": [id(cb) for cb in learn.cbs],
        "the callbacks' `run`": [cb.run for cb in learn.cbs],
        "the batch (none)": [learn.batch, learn.xb, learn.yb, learn.pred],
        "the hooks on the model": _hooks(learn),
        "which parameters are trained": [p.requires_grad for p in learn._parameters()],
        "gradient mode": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        "torch's default dtype": torch.get_default_dtype(),
    }


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, value in before.items() if not (value is after[name] or value == after[name])]


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _hooks(learn: Learner) -> list[Any]:
    """How many hooks each module and parameter has, and whether a module's `forward` was replaced."""
    modules = [(*(len(getattr(m, n)) for n in _HOOKS), "forward" in vars(m)) for m in _modules(learn)]
    tensors = [(len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in learn._parameters()]
    return [*modules, *tensors]


def _modules(learn: Learner) -> list[nn.Module]:
    return list(learn.model.modules()) if isinstance(learn.model, nn.Module) else []


def _modes(learn: Learner) -> list[bool]:
    return [module.training for module in _modules(learn)]


def _train_mode(learn: Learner) -> None:
    for module in _modules(learn):
        module.training = True


def _tensors(learn: Learner) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    if not isinstance(learn.model, nn.Module):
        return {}
    return {**dict(learn.model.named_parameters()), **dict(learn.model.named_buffers())}


def _attributes_with(cb: Callback, is_meant: Callable[[Tensor], bool]) -> list[str]:
    """Attributes of a callback in which such a tensor lies, however deep in lists and dicts."""
    own = {name: value for name, value in vars(cb).items() if name != "learn"}
    return [f"{type(cb).__name__}.{name}" for name, value in own.items() if any(map(is_meant, _tensors_in(value)))]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, L)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


# States


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _equal(a: Any, b: Any) -> bool:
    """Equality of plain data with tensors in it; a NaN equals itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b or (a != a and b != b))
