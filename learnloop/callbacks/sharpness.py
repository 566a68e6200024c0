"""Sharpness-aware minimization: each step takes the gradient from the worst place near the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from learnloop.callbacks.again import Noted, goes_back, kept_in_hand, note, put_back, unheard_by_readers
from learnloop.callbacks.gradients import GradientAccumulation, with_gradients
from learnloop.loop.callback import Callback, check_alone, handled_events
from learnloop.loop.layers import put_around, take_away
from learnloop.loop.spans import BACKWARD, run_span

_HEARD_AGAIN = {"after_pred", "after_loss", "before_backward", "after_cancel_backward", "after_backward"}


class SAM(Callback):
    """Steps with the gradient of the weights moved `rho` uphill, so that training ends in flat minima.

    In `before_step` the weights climb along the gradient, a second pass computes it there, and they come back to the
    bit. What GradientClip and the optimizer see is that second gradient. The second pass fires `after_pred`,
    `after_loss` and the events of the backward span once more, for all callbacks but those that only read; it is not
    recorded, moves no buffer of the model (running means of batch norm stay those of the first pass), and starts from
    the random state of the first, so that dropout draws the same masks and the stream is that of a training without
    SAM. Under GradientAccumulation it acts once per window, and is that of one big batch: the weights climb along the
    gradient of the whole window, and the second pass goes over all of its batches. In float16 a gradient that is not
    finite is left to MixedPrecision, which skips that step. Source: Foret et al., arXiv 2010.01412; `adaptive`: Kwon
    et al., arXiv 2102.11600. Cost per step: a second forward and backward pass, a copy of the weights, of their
    gradients and of the buffers; inputs and targets of an open window are kept.
    """

    order, run_valid, tasks = -8, False, ("fit", "lr_find")
    run_after, run_before = GradientAccumulation, ("MixedPrecision", "GradientClip")
    _stateattrs = ("_window",)

    def __init__(
        self,
        rho: float = 0.05,  # the distance; ten times as much is usual with `adaptive`
        adaptive: bool = False,  # measure the distance relative to the size of each weight
    ):
        if not rho >= 0:
            raise ValueError(f"`rho={rho}`: it is a distance; pass 0 or more.")
        self.rho, self.adaptive = rho, adaptive
        self._window: list[Noted] = []  # the batches whose gradients the next step takes
        self._coming: Noted | None = None  # the batch in hand, before its gradient is there
        self._is_again = False  # the second pass is running

    def before_fit(self) -> None:
        check_alone(SAM, self.learn, "move the weights from where the other has put them")
        self._window = []

    # The first pass: batches are noted until a step takes their gradients

    def before_train(self) -> None:
        put_around(self.learn, "_forward", self._noting)

    def _noting(self, forward: Callable[[], None]) -> None:
        learn = self.learn
        if learn.training and not self._is_again:
            if self._window and next(with_gradients(learn), None) is None:
                self._window = []  # a step was cancelled where this one could not hear of it
            self._coming = note(learn)
        forward()

    def before_backward(self) -> None:
        if self._coming is not None and not self._is_again:
            self._window.append(self._coming)
            self._coming = None

    def after_cancel_backward(self) -> None:
        if self._is_again:
            return
        if self._coming is None and self._window:
            self._window.pop()
        self._coming = None  # it was cancelled before this one could hear of it

    def cleanup_batch(self) -> None:
        if self.learn.training:
            self._coming = None

    # The second pass

    def before_step(self) -> None:
        params = list(with_gradients(self.learn))
        if params and self._window and not self._overflows(params):
            with self._climbed(params), kept_in_hand(self.learn), unheard_by_readers(self.learn, _hears_a_pass):
                self._pass_again()

    def _overflows(self, params: list[Tensor]) -> bool:
        scaler = self.learn.__dict__.get("scaler")  # of MixedPrecision
        return scaler is not None and scaler.is_enabled() and not bool(_norm([p.grad for p in params]).isfinite())

    @contextmanager
    def _climbed(self, params: list[Any]) -> Iterator[None]:
        """The weights uphill, without gradients; what ends the second pass early leaves the first gradients."""
        weights, grads = [p.detach().clone() for p in params], [p.grad for p in params]
        try:
            with torch.no_grad():
                torch._foreach_add_(params, ascent(weights, grads, self.rho, self.adaptive))
            _set_gradients(params, [None] * len(params))
            yield
        except BaseException:
            _set_gradients(params, grads)
            raise
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, weights)

    def _pass_again(self) -> None:
        learn, self._is_again = self.learn, True
        try:
            for noted in self._window:
                put_back(learn, noted)
                learn._forward()
                if goes_back(learn):
                    run_span(learn, BACKWARD, learn._backward)
            for cb in learn._grab_cbs(GradientAccumulation):
                if cb.run:
                    cb.before_step()  # the mean over a window that is not full
        finally:
            self._is_again = False

    # The end

    def after_step(self) -> None:
        self._window = []

    def cleanup_train(self) -> None:
        take_away(self.learn, "_forward", self._noting)
        self._window, self._coming = [], None

    def cleanup_fit(self) -> None:
        self.cleanup_train()  # where `before_train` was sent by hand


def ascent(weights: list[Tensor], grads: list[Tensor], rho: float, adaptive: bool = False) -> list[Tensor]:
    """The way uphill, `rho` long: `rho g / |g|`; adaptive `rho w² g / |w g|`. Any multiple of `grads` gives the same.

    So gradients that MixedPrecision has scaled need not be unscaled for it.
    """
    if adaptive:
        sizes = torch._foreach_abs(weights)
        grads = list(torch._foreach_mul(sizes, grads))
    norm = _norm(grads)
    way = torch._foreach_mul(grads, sizes) if adaptive else grads
    factors = {t.device: rho / (norm + 1e-12).to(t.device) for t in grads}
    return [t * factors[t.device] for t in way]


def _norm(tensors: list[Any]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)


def _set_gradients(params: list[Any], grads: list[Any]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


def _hears_a_pass(cb: Callback) -> bool:
    return type(cb).__call__ is not Callback.__call__ or not _HEARD_AGAIN.isdisjoint(handled_events(cb))
