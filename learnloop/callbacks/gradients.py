"""What happens to gradients between the backward pass and the step: gathered over batches, clipped."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from learnloop.data.batches import find_bs
from learnloop.loop.callback import Callback, check_alone
from learnloop.loop.cancel import CancelBatchException
from learnloop.loop.layers import put_around, take_away
from learnloop.loop.spans import STEP, run_span


class GradientAccumulation(Callback):
    """Gathers gradients over batches until `n_acc` samples are seen, then steps: a big batch in small memory.

    The gradient of a window is that of one batch of all its samples, however many they are, for a loss that is a mean
    over the batch. A batch that only gathers ends with `CancelBatchException` in `before_step`. The last window of an
    epoch is stepped even if it is not full: in its last batch, or in `after_train` where a loader does not say which
    that is. With `fit(n_step=…)` windows go on over passes. A window that a cancel or an error cuts is dropped.
    Source: docs.fast.ai/callback.training. Cost per batch: one multiplication of the loss, and of the gradients at the
    end of a window with more or fewer than `n_acc` samples.
    """

    order, run_valid = 6, False
    run_before = ("MixedPrecision", "GradientClip")  # which act once per window, on the whole of it
    _stateattrs = _batchattrs = ("count",)

    def __init__(self, n_acc: int = 32):  # samples
        if isinstance(n_acc, bool) or not isinstance(n_acc, int):
            raise TypeError(f"`n_acc={n_acc!r}`: pass a whole number of samples.")
        if n_acc < 1:
            raise ValueError(f"`n_acc={n_acc}`: a window has at least one sample; pass 1 or more.")
        self.n_acc = n_acc
        self.count = 0  # samples whose gradients were gathered in the open window
        self._coming = 0  # samples of the backward pass that is running
        self._factor = 1.0  # what the gradients were multiplied by for the step that is running
        self._is_counting = False  # `_counted` is around the backward pass
        self._is_ending = False  # the phase is over, and what is open is stepped

    def before_fit(self) -> None:
        check_alone(GradientAccumulation, self.learn, "gather what the other has scaled")
        self.count = self._coming = 0

    def before_batch(self) -> None:
        if not self._is_counting:  # also where it came in the middle of a phase
            put_around(self.learn, "_backward", self._counted)
            self._is_counting = True

    def _counted(self, backward: Callable[[], None]) -> None:
        """Whatever leaves a batch before its gradients are there, they are not counted."""
        backward()
        self.count, self._coming = self.count + self._coming, 0

    def before_backward(self) -> None:
        """The mean over the batch becomes its part of the window's sum, in units of `n_acc` samples."""
        learn = self.learn
        if self.count and _is_clear(learn):
            self.count = 0  # a step was cancelled where this one could not hear of it
        self._coming = find_bs(learn.yb if len(learn.yb) else learn.xb)
        if self._coming != self.n_acc:
            learn.loss_grad = learn.loss_grad * (self._coming / self.n_acc)

    def before_step(self) -> None:
        """Lets the step through where the window ends, with the mean over the samples that were really seen."""
        if self.count < self.n_acc and not self._is_ending and not self._is_last_batch():
            raise CancelBatchException  # not the step alone, which would clear the gradients
        if self.count not in (0, self.n_acc):
            self._factor = self.n_acc / self.count
            self._multiply(self._factor)

    def _is_last_batch(self) -> bool:
        learn = self.learn
        return learn.n_step is None and learn.n_iter is not None and learn.iter == learn.n_iter - 1

    def _multiply(self, factor: float) -> None:
        grads = [p.grad for p in with_gradients(self.learn)]
        if grads:
            torch._foreach_mul_(grads, factor)

    def after_step(self) -> None:
        self.count, self._factor = 0, 1.0

    def cleanup_step(self) -> None:
        if self._factor != 1.0:  # another callback cancelled the batch, so its gradients stay for the next step
            self._multiply(1 / self._factor)
            self._factor = 1.0

    def after_cancel_train(self) -> None:
        self._drop()

    def after_train(self) -> None:
        """Steps a window that is still open."""
        learn = self.learn
        if not self.count or _is_clear(learn):
            return
        self._is_ending, learn.stepped = True, False
        with suppress(CancelBatchException):  # there is no batch any more that it could leave
            run_span(learn, STEP, learn._step)
        learn.opt.zero_grad()

    def cleanup_train(self) -> None:
        self._is_ending = self._is_counting = False
        take_away(self.learn, "_backward", self._counted)
        self._drop()

    def _drop(self) -> None:
        if self.count:
            self.learn.opt.zero_grad()
        self.count = self._coming = 0


class GradientClip(Callback):
    """Before each step clamps every gradient to `max_value`, and scales all of them together down to norm `max_norm`.

    It acts once per update: after `GradientAccumulation` has gathered a window, and after `MixedPrecision` has unscaled
    the gradients. Source: Pascanu, Mikolov and Bengio, arXiv 1211.5063. Cost per step: one look at all gradients, and
    one multiplication of them; the device is not waited for.
    """

    order, run_valid = 11, False
    run_after = ("GradientAccumulation", "MixedPrecision")

    def __init__(
        self,
        max_norm: float | None = 1.0,  # of all gradients as one vector; 0 or None: no limit
        norm_type: float = 2.0,  # which norm: 1.0, 2.0, `math.inf` for the largest, …
        max_value: float | None = None,  # of a single gradient, before the norm is taken; 0 or None: no limit
    ):
        for name, limit in (("max_norm", max_norm), ("max_value", max_value)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"`{name}={limit}`: a limit is positive; pass 0 or None for none.")
        self.max_norm, self.norm_type, self.max_value = max_norm, norm_type, max_value

    def before_step(self) -> None:
        params = list(with_gradients(self.learn))
        if self.max_value and params:
            nn.utils.clip_grad_value_(params, self.max_value)
        if self.max_norm and params:
            nn.utils.clip_grad_norm_(params, self.max_norm, self.norm_type)


def with_gradients(learn: Any) -> Iterator[Any]:
    """The parameters that a step would move; gradients of others are never cleared, and would only grow."""
    return (p for group in learn.opt.param_lists for p in group if p.grad is not None)


def _is_clear(learn: Any) -> bool:
    return next(with_gradients(learn), None) is None
