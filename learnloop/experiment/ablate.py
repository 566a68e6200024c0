"""What each callback is worth: the same training with and without it, over several seeds."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from datetime import datetime
from pathlib import Path
from typing import Any

from learnloop.experiment.designs import design_of
from learnloop.experiment.fingerprint import configuration, differences, fingerprint
from learnloop.experiment.lines import append_line, read_lines
from learnloop.experiment.study import Study, stored_trials
from learnloop.experiment.trials import Metric, Recipe, Trial, check_picklable, run_trials
from learnloop.learner import Learner
from learnloop.loop.callback import Callback, nearest
from learnloop.machine import environment

__all__ = ["ablate"]


def ablate(
    make_learner: Callable[[], Any],  # makes a learner, its model and its loaders anew
    cbs: Mapping[str, Callable[[], Any]],  # by name, a class or function that makes a callback, or several
    fit: Any,  # a function of `(learn, cbs)`, or a verb with its arguments: `("fit_one_cycle", 5, {"lr_max": 0.01})`
    seeds: int | Iterable[int] = 5,  # so many from 0 on, or these
    metric: Metric = None,  # a column of the record, of which the last row counts, or `learn -> float`; None: the last
    design: str = "leave-one-out",  # or 'add-one-in', or 'pairs': each alone and every two together
    executor: Executor | None = None,  # where trainings run at once; None: one after the other, here
    path: str | Path | None = None,  # a file that keeps each training as it ends, and from which a study goes on
    confidence: float = 0.95,
) -> Study:
    """Trains with and without each callback, every arm with the same seeds, and compares them pair by pair.

    A seed gives every arm the same initial weights and, from loaders of ours and plain ones of torch, the same order of
    the data. The arms of 'leave-one-out' are compared with all callbacks together, those of 'add-one-in' and 'pairs'
    with none. A training that fails is named in the study, and tried again when the study goes on from `path`; what is
    made or trained otherwise than in that file is refused by a ValueError.

    Any `concurrent.futures.Executor` will do, Dask's `client.get_executor()` too; trainings in threads of one process
    wait for each other. Processes want one thread each:
    `ProcessPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,))`.
    """
    _check(cbs, fit)
    plan = design_of(design, list(cbs))
    check_picklable(executor, make_learner=make_learner, fit=fit, metric=metric, **_by_place(cbs))
    recipes = {arm: Recipe(make_learner, {n: cbs[n] for n in names}, fit, metric) for arm, names in plan.arms.items()}
    numbers = _numbers_of(seeds)
    about = {"design": design, "cbs": list(cbs), "metric": _name_of_metric(metric), **_moment()}
    store = _Store(path, recipes)
    trials = {key: trial for key, trial in store.trials().items() if key[1] in numbers and key[0] in recipes}
    jobs = [(recipe, arm, seed) for seed in numbers for arm, recipe in recipes.items()]
    left = [job for job in jobs if (job[1], job[2]) not in trials or trials[job[1:]].value is None]
    if left:
        store.begin(about)
    for trial, has_run in run_trials(left, executor):
        trials[trial.arm, trial.seed] = trial
        if has_run:
            store.keep(trial)
    return Study(plan, trials.values(), about["metric"], confidence, about)


class _Store:
    """The file of a study, if there is one: what was trained already, and each training as it ends."""

    def __init__(self, path: str | Path | None, recipes: Mapping[str, Recipe]):
        self.path = None if path is None else Path(path)
        self.configurations = {
            arm: configuration(r.make_learner, r.factories, r.fit, r.metric) for arm, r in recipes.items()
        }
        self.fingerprints = {arm: fingerprint(c) for arm, c in self.configurations.items()}

    def trials(self) -> dict[tuple[str, int], Trial]:
        """Those in the file, the last of each; ValueError where the file is no study or of another configuration."""
        if self.path is None or not self.path.exists():
            return {}
        lines = list(read_lines(self.path))
        is_whole = b"\n" in self.path.read_bytes()  # else a study was killed in its first line
        if is_whole and not any(line.get("kind") == "study" for line in lines):
            raise ValueError(f"`path={str(self.path)!r}` is a file that no study has written. Take another name.")
        for line in lines:
            self._check_same(line, lines)
        return stored_trials(lines)

    def _check_same(self, line: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
        arm, mark = line.get("arm", ""), line.get("fingerprint")
        if line.get("kind") != "trial" or self.fingerprints.get(arm, mark) == mark:
            return
        then = _configuration_of(mark, lines)
        what = ", ".join(differences(then, self.configurations[arm])) if then else "it"
        raise ValueError(
            f"`{self.path}` holds trainings of {arm!r} with another configuration: {what} changed since. "
            "Take another `path`, or delete the file to start anew."
        )

    def begin(self, about: Mapping[str, Any]) -> None:
        self._write({"kind": "study", **about, "configurations": self._by_fingerprint()})

    def _by_fingerprint(self) -> dict[str, Any]:
        return {self.fingerprints[arm]: made for arm, made in self.configurations.items()}

    def keep(self, trial: Trial) -> None:
        self._write({"kind": "trial", "fingerprint": self.fingerprints[trial.arm], **trial.fields()})

    def _write(self, fields: dict[str, Any]) -> None:
        if self.path is not None:
            append_line(self.path, fields)


def _configuration_of(mark: Any, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = (line.get("configurations", {}).get(mark) for line in lines if line.get("kind") == "study")
    return next((configuration for configuration in found if configuration), None)


def _numbers_of(seeds: int | Iterable[int]) -> list[int]:
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers:
        raise ValueError(f"`seeds={seeds!r}`: pass how many, or several numbers. From 2 seeds on there are intervals.")
    return numbers


def _check(cbs: Any, fit: Any) -> None:
    if not isinstance(cbs, Mapping):
        raise TypeError(f"`cbs` is a {type(cbs).__name__}; pass names and what makes them: `{{'mixup': MixUp}}`.")
    for name, factory in cbs.items():
        if not callable(factory) or isinstance(factory, Callback):
            raise TypeError(
                f"`cbs[{name!r}]={factory!r}` makes no callback: each training needs a new one. Pass the class, or "
                "`functools.partial(MixUp, alpha=0.2)`."
            )
    _check_fit(fit)


def _check_fit(fit: Any) -> None:
    if callable(fit):
        return
    verb = fit[0] if isinstance(fit, (list, tuple)) and fit else fit
    if not isinstance(verb, str):
        raise TypeError(f"`fit={fit!r}`: pass a function of `(learn, cbs)`, or a verb: `('fit_one_cycle', 5)`.")
    if not callable(getattr(Learner, verb, None)):
        raise ValueError(f"`fit={fit!r}`: a Learner has no `{verb}`.{nearest(verb, Learner)}")


def _by_place(cbs: Mapping[str, Any]) -> dict[str, Any]:
    return {f"cbs[{name!r}]": factory for name, factory in cbs.items()}


def _name_of_metric(metric: Metric) -> str | None:
    return getattr(metric, "__name__", "the metric") if callable(metric) else metric


def _moment() -> dict[str, Any]:
    return {"at": datetime.now().astimezone().isoformat(timespec="seconds"), "environment": environment()}
