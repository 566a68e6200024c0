"""Batches that jump out of the range of those before: left out, counted, and not without end."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from learnloop.callbacks.again import Buffers
from learnloop.callbacks.gradients import GradientAccumulation, with_gradients
from learnloop.callbacks.precision import MixedPrecision
from learnloop.callbacks.sharpness import SAM
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelBatchException, CancelStepException
from learnloop.loop.spans import STEP

_TO_DEVIATION = 1.4826  # by this the median deviation of a normal distribution is its standard deviation
_LEAST = 0.01  # of the median: a smaller deviation counts as this, so that a flat stretch does not make noise a spike


class SpikeGuard(Callback):
    """Leaves out training batches whose loss or gradient norm jumps far above that of the batches before.

    The limit is the median of the last `window` values and so many robust deviations (1.4826 median absolute
    deviations, at least 1 % of the median); a value that is infinite or no number is above every limit. A loss is
    looked at in `after_loss`: that batch is cancelled before it has a gradient, and what it moved in the model's
    buffers is put back. A norm, that of all gradients before clipping, is looked at in `before_step`: that step is
    cancelled, under GradientAccumulation with its whole window. Such batches stay in the record with their loss, and
    stand in `skipped` with epoch, batch, what it was, value and limit. Where `max_in_row` come one after another it is
    no jump but another level: with a warning the range begins anew and they are trained on, except where they are not
    finite, which ends the fit with a FloatingPointError. Source: the skipped batches of Chowdhery et al., arXiv
    2204.02311, section 5.1, with the robust range of Leys et al. 2013, doi 10.1016/j.jesp.2013.03.013. Cost per batch:
    the host waits for the device once for each of the two, and a copy of the buffers.
    """

    order, run_valid, tasks = 10.5, False, ("fit",)
    run_after, run_before = (GradientAccumulation, SAM, MixedPrecision), "GradientClip"
    _stateattrs = ("skipped", "_recent", "_n_in_row")

    def __init__(
        self,
        loss: float | None = 8.0,  # robust deviations above the median; None: losses are not looked at
        grad_norm: float | None = 8.0,  # the same for the norm of all gradients
        window: int = 128,  # values that make the range
        warmup: int = 32,  # values before anything but what is not finite is left out
        max_in_row: int = 5,  # batches left out one after another, at most
    ):
        for name, limit in (("loss", loss), ("grad_norm", grad_norm)):
            if limit is not None and not limit > 0:
                raise ValueError(f"`{name}={limit}`: pass a number of deviations above 0, or None to look away.")
        if not 2 <= warmup <= window:
            raise ValueError(f"`warmup={warmup}`: it takes 2 values or more to make a range, and `window` at most.")
        if max_in_row < 1:
            raise ValueError(f"`max_in_row={max_in_row}`: pass 1 or more.")
        self.limits = {"loss": loss, "grad_norm": grad_norm}
        self.window, self.warmup, self.max_in_row = window, warmup, max_in_row
        self._begin()

    def _begin(self) -> None:
        self.skipped: list[dict[str, Any]] = []  # what was left out in this fit, or in the last one
        self._recent: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        self._n_in_row = 0
        self._is_left_out = False  # the batch in hand
        self._looked_at = -1  # number of the batch whose loss was looked at
        self._buffers: Buffers | None = None

    def before_fit(self) -> None:
        self._begin()

    def before_batch(self) -> None:
        self._buffers, self._is_left_out = Buffers(self.learn.model), False

    def after_loss(self) -> None:
        learn = self.learn
        is_seen = learn.train_iter == self._looked_at or any(span is STEP for span in learn._open_spans)
        if self.limits["loss"] is None or is_seen:  # another part of the batch, or another pass over it
            return
        self._looked_at = learn.train_iter
        loss = learn._raw_loss if learn._loss is None else learn._loss
        if getattr(loss, "numel", lambda: 0)() == 1 and self._is_spike("loss", loss.item()):
            self._buffers.put_back()  # type: ignore[union-attr]
            raise CancelBatchException

    def before_step(self) -> None:
        if self.limits["grad_norm"] is None:
            return
        grads = [p.grad for p in with_gradients(self.learn)]
        if grads and self._is_spike("grad_norm", torch.nn.utils.get_total_norm(grads).item()):
            raise CancelStepException

    def after_batch(self) -> None:
        if not self._is_left_out:
            self._n_in_row = 0

    def _is_spike(self, what: str, value: float) -> bool:
        recent = self._recent[what]
        limit = upper_limit(recent, self.limits[what]) if len(recent) >= self.warmup else math.inf
        if math.isfinite(value):
            self._recent[what] = [*recent[1 - self.window :], value]
        if value < limit:
            return False
        if self._n_in_row == self.max_in_row:
            self._begin_anew(what, value)
            return False
        learn, self._n_in_row, self._is_left_out = self.learn, self._n_in_row + 1, True
        self.skipped.append({"epoch": learn.epoch, "batch": learn.iter, "what": what, "value": value, "limit": limit})
        return True

    def _begin_anew(self, what: str, value: float) -> None:
        n, where = self._n_in_row, f"epoch {self.learn.epoch}, batch {self.learn.iter}"
        if not math.isfinite(value):
            raise FloatingPointError(
                f"SpikeGuard left out {n} batches in a row, and in {where} the {what} is {value} again: the weights "
                "are those from before. Lower the learning rate, or look at the batches in `learn.spike_guard.skipped`."
            )
        self._recent[what], self._n_in_row = [value], 0
        warnings.warn(
            f"SpikeGuard left out {n} batches in a row; in {where} the {what} is {value:.4g}, which is taken for its "
            "new level and trained on.",
            stacklevel=2,
        )

    def cleanup_batch(self) -> None:
        if self.learn.training:
            self._buffers = None

    def cleanup_fit(self) -> None:
        self._buffers = None


def upper_limit(values: Sequence[float], n_deviations: Any) -> float:
    """The median and so many robust deviations."""
    middle = float(np.median(values))
    deviation = _TO_DEVIATION * float(np.median([abs(value - middle) for value in values]))
    return middle + n_deviations * max(deviation, _LEAST * abs(middle))
