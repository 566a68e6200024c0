"""Hyper-parameters over the course of a training."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from learnloop.data.keyed import length
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelEpochException


class ParamScheduler(Callback):
    """Sets hypers before each training batch: `ParamScheduler({"lr": SchedCos(1e-2, 0)})`.

    A schedule is a function of `pct_train`, from 0 to 1; it may return one value per group. What was set is in
    `recorder.hps`. Cost per batch: the schedules themselves and one `set_hyper` each.
    """

    order, run_valid = 60, False
    tasks = ("fit", "lr_find")
    _stateattrs: tuple[str, ...] = ("hps",)

    def __init__(self, scheds: Mapping[str, Callable[[float], Any]]):
        if not isinstance(scheds, Mapping) or not all(callable(f) for f in scheds.values()):
            raise TypeError(
                f"`scheds={scheds!r}`: pass a dict from hyper to schedule, like {{'lr': SchedCos(1e-2, 0)}}."
            )
        self.scheds = scheds

    def identity(self) -> dict[str, Any]:
        """Ten values of each schedule; not the last, at which some are not defined and which no batch asks for."""
        points = [i / 10 for i in range(10)]
        return {
            f"schedule of `{name}`": [_value(schedule, at) for at in points] for name, schedule in self.scheds.items()
        }

    def before_fit(self) -> None:
        """Refuses a schedule that can never act: of an unknown hyper, or over an unknown length."""
        self.hps: dict[str, list[float]] = {name: [] for name in self.scheds}
        learn = self.learn
        if learn.n_step is None and learn.dls is not None and length(learn._loader(0)) is None:
            raise ValueError(
                "a schedule needs to know how long the training is, and the training loader has no length. "
                "Say how many updates to make: `fit(n_step=…)`."
            )
        _check_hypers(self.scheds, learn.opt)

    def before_batch(self) -> None:
        learn = self.learn
        pct = learn.pct_train
        for name, schedule in self.scheds.items():
            learn.opt.set_hyper(name, schedule(pct))

    def after_batch(self) -> None:
        hyper = self.learn.opt.hypers[-1]
        for name, values in self.hps.items():
            values.append(hyper[name])

    def after_fit(self) -> None:
        self._publish()

    def cleanup_fit(self) -> None:
        self._publish()  # after an error too: what was recorded stays to be looked at

    def _publish(self) -> None:
        recorder = self.learn.__dict__.get("recorder")
        if recorder is not None and "hps" in vars(self):
            recorder.hps.update(self.hps)


def _value(schedule: Callable[[float], Any], at: float) -> Any:
    """In plain numbers; None where it fails, which it will again where it acts."""
    try:
        return np.asarray(schedule(at)).tolist()
    except Exception:
        return None


def _check_hypers(names: Iterable[str], opt: Any) -> None:
    """ValueError for a hyper that the optimizer does not have: nothing would read it."""
    there = {} if opt is None else opt.hypers[-1]
    for name in names:
        if opt is not None and name not in there and name != "mom":  # one cycle moves it whether it is read or not
            near = get_close_matches(name, there, n=1)
            raise ValueError(
                f"there is a schedule of `{name}`, but the optimizer's hypers are {', '.join(there)}."
                + (f" Did you mean `{near[0]}`?" if near else "")
                + f" If a stepper of yours reads it, create it first: `learn.opt.set_hyper({name!r}, …)`."
            )


class SkipToEpoch(Callback):
    """Cancels every epoch before `epoch`; `fit(start_epoch=…)` does the same without their events."""

    order = 70

    def __init__(self, epoch: int):
        self.skip_to = epoch

    def before_epoch(self) -> None:
        if self.epoch < self.skip_to:
            raise CancelEpochException
