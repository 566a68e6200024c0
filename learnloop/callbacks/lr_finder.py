"""The finder: a short training with a growing learning rate, and what its losses suggest."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

from learnloop.callbacks.schedule import ParamScheduler
from learnloop.loop.cancel import CancelFitException
from learnloop.optim.schedules import SchedExp

DIVERGED = 4  # times the best smoothed loss: where a finder's pass ends


class LRFinder(ParamScheduler):
    """Lets the rate grow by equal factors over `num_it` batches, and ends once the loss diverges or is not a number.

    Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv 1506.01186). `learn.lr_find()` runs it and puts
    everything back. Cost per batch: the smoothed loss is read, which waits for the device.
    """

    tasks = ("lr_find",)
    _stateattrs = ("best_loss",)

    def __init__(
        self,
        start_lr: Any = 1e-7,  # a number, or one per group
        end_lr: Any = 10,
        num_it: int = 100,  # batches, at least 6
        stop_div: bool = True,  # end where the loss is four times its best
    ):
        start, end = np.asarray(start_lr, dtype=float), np.asarray(end_lr, dtype=float)
        if start.shape != end.shape or not (0 < start).all() or not (start < end).all():
            raise ValueError(
                f"`start_lr={start_lr!r}, end_lr={end_lr!r}`: the rate grows from start to end; pass positive numbers, "
                "or one per group in both, with start below end."
            )
        super().__init__({"lr": SchedExp(start, end) if start.ndim else SchedExp(float(start), float(end))})
        self.num_it, self.stop_div, self.best_loss = max(6, num_it), stop_div, float("inf")

    def before_fit(self) -> None:
        super().before_fit()
        self.best_loss = float("inf")

    def before_batch(self) -> None:
        self.learn.opt.set_hyper("lr", self.scheds["lr"](self.learn.train_iter / self.num_it))

    def after_batch(self) -> None:
        super().after_batch()
        learn = self.learn
        loss = float(learn.smooth_loss)
        self.best_loss = min(self.best_loss, loss)
        if self.stop_div and not loss <= DIVERGED * self.best_loss:  # this way round a loss that is no number ends it
            raise CancelFitException
        if learn.train_iter >= self.num_it:
            raise CancelFitException


# What the losses suggest: functions of (rates, smoothed losses, number of batches) -> (rate, (rate, loss))

Suggestion = tuple[float, tuple[float, float]]


def valley(lrs: Sequence[float], losses: Sequence[float], num_it: int) -> Suggestion:
    """Two thirds... of the way into the longest stretch in which losses fall, as ESRI's steepest-valley rule has it."""
    start, end = _longest_fall(losses)
    third = (end - start) / 3
    return _at(lrs, losses, start + int(third) + int(third / 2))


def _longest_fall(losses: Sequence[float]) -> tuple[int, int]:
    """(start, end) of the longest falling subsequence by its length, as indices."""
    lengths, tails = [], []  # tails[k]: the negated largest last loss of a falling run of k + 1 losses
    for loss in losses:
        k = bisect_left(tails, -loss)
        tails[k : k + 1] = [-loss]
        lengths.append(k + 1)
    end = max(range(len(lengths)), key=lambda i: (lengths[i], -i), default=0)
    return (end - lengths[end] if lengths else 0), end


def slide(lrs: Sequence[float], losses: Sequence[float], num_it: int, lr_diff: int = 15, thresh: float = 0.005,
          adjust_value: float = 1.0) -> Suggestion:
    """The rate at which an interval of `lr_diff` slides to where losses stop being steep."""
    raise NotImplementedError


def _at(lrs: Sequence[float], losses: Sequence[float], index: int) -> Suggestion:
    rate, loss = float(lrs[index]), float(losses[index])
    return rate, (rate, loss)
