"""Mixed precision: the forward pass and the loss in float16 or bfloat16; weights, gradients and updates in float32."""

import warnings
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from learnloop.data.batches import to_float
from learnloop.loop.callback import Callback, check_alone
from learnloop.loop.cancel import CancelStepException

_SMALL = (torch.float16, torch.bfloat16)


class AMPMode(Enum):
    """The number format of mixed precision: float16 needs its loss scaled, bfloat16 has the range of float32."""

    FP16 = "fp16"
    BF16 = "bf16"


class MixedPrecision(Callback):
    """Runs model and loss under `torch.autocast`, and in float16 scales the loss by a `torch.amp.GradScaler`.

    Autocast is open from `before_batch` to `after_loss`; predictions and losses leave it in float32. In float16
    gradients stay scaled between steps and are unscaled right before one, so that callbacks that run later clip true
    gradients. A step with a gradient that is not finite is cancelled, counted in `n_skipped`, and clears the gradients;
    a fit begins and ends without any. Each fit has a scaler of its own: `scaler`, and `learn.scaler` meanwhile.
    Source: Micikevicius et al., arXiv 1710.03740. Cost per batch: that of torch's autocast and scaler; in float16 the
    host waits for the device once per step, in bfloat16 never.
    """

    order = 10
    scaler: Any = None  # of this fit, or of the last one; in bfloat16 it scales by nothing; None before the first

    def __init__(
        self,
        amp_mode: str | AMPMode = AMPMode.FP16,
        *,
        init_scale: float = 2.0**16,  # of the loss, at the start of each fit
        growth_factor: float = 2.0,  # what the scale grows by after `growth_interval` steps without an overflow
        backoff_factor: float = 0.5,  # what it shrinks by after one with
        growth_interval: int = 2000,  # steps
    ):
        self.amp_mode = _mode(amp_mode)
        self.dtype = torch.float16 if self.amp_mode is AMPMode.FP16 else torch.bfloat16
        self.scaling: dict[str, Any] = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
        }
        _check_scaling(**self.scaling)
        self.n_skipped = 0  # steps of this fit, or of the last one, that were skipped for overflow
        self._open: list[tuple[int, Any]] = []  # autocast of the batch in hand, and of those in which runs are nested
        self._attempt: _Attempt | None = None  # the step for which gradients are unscaled
        if self.amp_mode is AMPMode.BF16:
            for event in ("before_backward", "before_step", "after_step", "cleanup_step"):
                setattr(self, event, None)  # nothing to scale: the loop need not call these in every batch

    def __getstate__(self) -> dict[str, Any]:
        """A copy has opened nothing."""
        return {**vars(self), "_open": [], "_attempt": None}

    def before_fit(self) -> None:
        learn = self.learn
        check_alone(MixedPrecision, learn, "scale the loss, and close the other's autocast")
        if learn.task in ("fit", "lr_find"):
            self._begin()

    def _begin(self) -> None:
        learn, self.n_skipped = self.learn, 0
        if self._device_type() == "cuda" and self.dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise ValueError("this GPU has no bfloat16. Use `learn.to_fp16()`.")
        self.scaler = learn.scaler = self._new_scaler()
        if self.scaler.is_enabled():
            learn.opt.zero_grad()  # gradients from before are not scaled

    def _new_scaler(self) -> Any:
        return torch.amp.GradScaler(self._device_type(), enabled=self.dtype is torch.float16, **self.scaling)

    def _device_type(self) -> str:
        learn = self.learn
        return (learn._device or learn._find_device()).type

    # Autocast

    def before_batch(self) -> None:
        autocast = torch.autocast(self._device_type(), dtype=self.dtype)
        autocast.__enter__()
        self._open.append((self.learn._depth, autocast))

    def after_pred(self) -> None:
        learn = self.learn
        learn.pred = to_float(learn.pred)

    def after_loss(self) -> None:
        self._close()
        learn = self.learn
        loss = learn._raw_loss
        if isinstance(loss, Tensor) and loss.dtype in _SMALL:  # the model's own loss, or that of an operation in it
            learn.loss, learn.loss_grad = learn.loss.float(), learn.loss_grad.float()

    def reopen(self) -> None:
        """Opens autocast for a batch that is computed once more, if it is not open still."""
        if not self._is_open():
            self.before_batch()

    def cleanup_batch(self) -> None:
        self._close()

    def _close(self) -> None:
        """Closes autocast, if this batch has opened it: one around it, of a batch that a run is nested in, stays."""
        if self._is_open():
            self._open.pop()[1].__exit__(None, None, None)

    def _is_open(self) -> bool:
        return bool(self._open) and self._open[-1][0] == self.learn._depth

    # Scaling

    def before_backward(self) -> None:
        if self.scaler is None:  # this was added in the middle of a fit
            self._begin()
        learn = self.learn
        loss = learn._raw_loss if learn._loss_grad is None else learn._loss_grad  # `loss_grad` would copy it first
        if isinstance(loss, Tensor):
            learn.loss_grad = self.scaler.scale(loss)

    def before_step(self) -> None:
        """Unscales the gradients; skips the step where one is not finite."""
        opt = self.learn.opt
        if self.scaler is None or not _has_gradients(opt):
            return
        attempt = _Attempt(opt)
        self.scaler.step(attempt)
        self._attempt = attempt
        if not attempt.is_finite:
            self.n_skipped += 1
            raise CancelStepException

    def after_step(self) -> None:
        if self._attempt is not None:
            self._end_step()

    def cleanup_step(self) -> None:
        if self._attempt is not None:  # the whole batch was cancelled, so its gradients stay for the next step
            self._end_step()
            _scale_gradients(self.learn.opt, self.scaler.get_scale())

    def _end_step(self) -> None:
        self._attempt = None
        self.scaler.update()

    # The end

    def after_fit(self) -> None:
        n_done = self.learn.opt_iter
        n = n_done + self.n_skipped
        if self.learn.task == "fit" and self.n_skipped and (not n_done or (n >= 10 and n_done <= self.n_skipped)):
            warnings.warn(
                f"{self.n_skipped} of the {n} steps were skipped, for gradients that are infinite or no numbers. "
                f"The scale of the loss is {self.scaler.get_scale():g} now: begin with that (`init_scale`), or use "
                "`to_bf16()`; if the loss itself is no number, lower the learning rate.",
                stacklevel=2,
            )

    def cleanup_fit(self) -> None:
        while self._open:  # taken off inside a nested run
            self._open.pop()[1].__exit__(None, None, None)
        learn = self.learn
        scaler = learn.__dict__.pop("scaler", None)
        if scaler is not None and scaler.is_enabled():
            learn.opt.zero_grad()  # those that a cancelled batch left are scaled, which nobody could know later

    def state_dict(self) -> dict[str, Any]:
        """The scale of the loss, what it needs to grow, and the steps that were skipped."""
        return {"scaler": None if self.scaler is None else self.scaler.state_dict(), "n_skipped": self.n_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_skipped = state["n_skipped"]
        if state["scaler"] is None:
            self.scaler = None
            return
        if self.scaler is None:
            self.scaler = self._new_scaler()
        if state["scaler"]:  # empty: it was saved in bfloat16
            self.scaler.load_state_dict(state["scaler"])


class _Attempt:
    """An optimizer as far as a GradScaler knows one: it shows gradients, and notes that its step may be made."""

    def __init__(self, opt: Any):
        self.param_groups = [{"params": params} for params in opt.param_lists]
        self.is_finite = False

    def step(self) -> None:
        self.is_finite = True


def _has_gradients(opt: Any) -> bool:
    return any(p.grad is not None for params in opt.param_lists for p in params)


def _scale_gradients(opt: Any, scale: float) -> None:
    for params in opt.param_lists:
        for p in params:
            if p.grad is not None:
                p.grad.mul_(scale)


def _mode(amp_mode: Any) -> AMPMode:
    try:
        return AMPMode(amp_mode)
    except ValueError:
        known = " or ".join(repr(mode.value) for mode in AMPMode)
        raise ValueError(f"`amp_mode` is {amp_mode!r}; pass {known}.") from None


def _check_scaling(init_scale: float, growth_factor: float, backoff_factor: float, growth_interval: int) -> None:
    if not init_scale > 0:
        raise ValueError(f"`init_scale` is {init_scale}; the loss is multiplied by it, so pass more than 0.")
    if not growth_factor > 1:
        raise ValueError(f"`growth_factor` is {growth_factor}; the scale grows by it, so pass more than 1.")
    if not 0 < backoff_factor < 1:
        raise ValueError(f"`backoff_factor` is {backoff_factor}; the scale shrinks by it: pass a number from 0 to 1.")
    if growth_interval < 1:
        raise ValueError(f"`growth_interval` is {growth_interval}; it counts steps, so pass 1 or more.")
