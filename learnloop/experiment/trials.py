"""One training of a study, and many of them one after the other or on an executor."""

import math
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any

from learnloop.data.keyed import mix, preserved_randomness
from learnloop.loop.dispatch import listed
from learnloop.seeds import set_seed

__all__ = ["Recipe", "Trial", "check_picklable", "run_trial", "run_trials"]

Metric = str | Callable[[Any], float] | None

_ONE_AT_A_TIME = threading.Lock()  # threads of one process share the random generators


@dataclass(frozen=True)
class Recipe:
    """How the trainings of an arm are made; it goes to other processes."""

    make_learner: Callable[[], Any]
    factories: Mapping[str, Callable[[], Any]]  # of the callbacks of the arm
    fit: Any  # a function of a learner and its callbacks, or the name of a verb and its arguments
    metric: Metric


@dataclass(frozen=True)
class Trial:
    """What one training came to."""

    arm: str
    seed: int
    value: float | None = None  # of the metric; None where the training failed
    row: Mapping[str, Any] | None = None  # the last one of the record
    seconds: float = 0.0
    error: str | None = None  # what went wrong

    def fields(self) -> dict[str, Any]:
        """For a line of a file."""
        return asdict(self)


def run_trials(
    jobs: Iterable[tuple[Recipe, str, int]],  # recipe, arm and seed of each
    executor: Executor | None,  # None: here, one after the other
) -> Iterator[tuple[Trial, bool]]:
    """Each training as it ends; and whether it has run: one that never came back may do so another time."""
    if executor is None:
        for job in jobs:
            yield run_trial(*job), True
        return
    waiting: dict[Future[Trial], tuple[str, int]] = {}
    try:
        for job in jobs:
            waiting[_submitted(executor, job)] = job[1:]
        for future in as_completed(waiting):
            yield _outcome(future, *waiting[future])
    finally:
        for future in waiting:
            future.cancel()


def _submitted(executor: Executor, job: tuple[Recipe, str, int]) -> "Future[Trial]":
    try:
        return executor.submit(run_trial, *job)
    except Exception as error:  # such as a pool that broke before the last job was handed over
        failed: Future[Trial] = Future()
        failed.set_exception(error)
        return failed


def _outcome(future: "Future[Trial]", arm: str, seed: int) -> tuple[Trial, bool]:
    error = future.exception()
    if error is None:
        return future.result(), True
    return Trial(arm, seed, error=f"the worker did not answer: {_said(error)}"), False


def run_trial(recipe: Recipe, arm: str, seed: int) -> Trial:
    """Makes a learner and trains it; what is raised is told in `error`, and random generators are put back."""
    start = time.perf_counter()
    value, row, said = None, None, None
    with _ONE_AT_A_TIME, preserved_randomness():
        try:
            learn = _trained(recipe, seed)
            row = _last_row(learn)
            value = _measured(learn, row, recipe.metric)
        except Exception as error:
            said = _said(error)
    if value is not None and not math.isfinite(value):
        value, said = None, f"the metric is {value}"
    return Trial(arm, seed, value, row, round(time.perf_counter() - start, 3), said)


def _trained(recipe: Recipe, seed: int) -> Any:
    """A learner after its fit: the weights to begin with and the order of the data depend on the seed alone."""
    set_seed(seed)
    learn = recipe.make_learner()
    cbs = [cb for factory in recipe.factories.values() for cb in listed(factory())]
    set_seed(mix(seed, 1))  # whatever making them has drawn
    if getattr(learn.dls, "seed", 0) is None:
        learn.dls.seed = mix(seed, 2)  # for a fit of several phases, between which callbacks may have drawn
    with learn.no_bar(), learn.no_mbar(), learn.no_logging():
        _fit(learn, cbs, recipe.fit)
    return learn


def _fit(learn: Any, cbs: list[Any], fit: Any) -> None:
    if callable(fit):
        fit(learn, cbs=cbs)
        return
    verb, *args = (fit,) if isinstance(fit, str) else fit
    kwargs = args.pop() if args and isinstance(args[-1], Mapping) else {}
    getattr(learn, verb)(*args, **kwargs, cbs=cbs)


def _last_row(learn: Any) -> dict[str, Any]:
    recorder = learn.__dict__.get("recorder")
    return dict(recorder.history[-1]) if recorder is not None and recorder.history else {}


def _measured(learn: Any, row: Mapping[str, Any], metric: Metric) -> float:
    if callable(metric):
        return float(metric(learn))
    columns = [name for name in row if name not in ("epoch", "time")]
    name = (columns[-1] if columns else None) if metric is None else metric
    if name not in columns:
        raise ValueError(f"`metric={metric!r}`: the record has {', '.join(columns) or 'no row'}.")
    if row[name] is None:
        raise ValueError(f"there is no {name} in the last row of the record.")
    return float(row[name])


def _said(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_picklable(executor: Executor | None, **parts: Any) -> None:
    """TypeError that names what cannot go to a process of a ProcessPoolExecutor, and how to write it instead."""
    if not isinstance(executor, ProcessPoolExecutor):
        return
    for name, part in parts.items():
        try:
            pickle.dumps(part)
        except Exception as error:
            raise TypeError(
                f"`{name}` cannot be sent to another process: {error}. Write a function at the top level of a module "
                "(`def make(): …`), no lambda and none inside of another function; `functools.partial` of one will do."
            ) from error
