"""Whole algorithms as one stepper: torch's fused updates over our state, with the numbers of the single steppers."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from learnloop.optim.steppers import grads_of, list_stepper

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@list_stepper(wd=0.0)
def fused_sgd(
    ps: list[Tensor],
    lr: float,
    mom: float,
    wd: float,
    do_wd: bool = True,
    grad_avg: Any = None,
    has_momentum: bool = True,  # False keeps no `grad_avg`
    decouple_wd: bool = True,
    kept: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any] | None:
    """`weight_decay` or `l2_reg`, `average_grad`, and `momentum_step` or `sgd_step`, at once."""
    decay = wd if do_wd else 0.0
    if kept is None or "fused" not in kept:
        kept = _noted(ps, kept)
    if not (decay or has_momentum or kept["sparse"]):
        torch._foreach_add_(ps, grads_of(ps), alpha=-lr)  # one pass, as the fused form, and called faster
        return None
    fused, is_new = kept["fused"], has_momentum and grad_avg is None
    if is_new:
        grad_avg = [torch.zeros_like(p) for p in ps]
    if decay and decouple_wd and (has_momentum or not fused):
        torch._foreach_mul_(ps, 1 - lr * decay)
        decay = 0.0  # without momentum the gradient's way is the same: p - lr * (grad + wd * p)
    sgd(
        ps,
        grads_of(ps),
        grad_avg if has_momentum else kept["absent"],
        has_sparse_grad=kept["sparse"],
        fused=fused,
        weight_decay=decay,
        # At 0 torch leaves the average alone; it must become the gradient, as it does at the smallest number.
        momentum=(mom or sys.float_info.min) if has_momentum else 0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    return {"grad_avg": grad_avg} if is_new else None


@list_stepper(eps=1e-5, wd=0.0)
def fused_adam(
    ps: list[Tensor],
    lr: float,
    mom: float,
    sqr_mom: float,
    eps: float,
    wd: float,
    do_wd: bool = True,
    step: int = 0,
    grad_avg: Any = None,
    sqr_avg: Any = None,
    decouple_wd: bool = True,
    kept: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """`weight_decay` or `l2_reg`, both averages dampened, `step_stat` and `adam_step`, at once."""
    if kept is None or "fused" not in kept:
        kept = _noted(ps, kept)
        device = ps[0].device if kept["fused"] else "cpu"
        kept["steps"] = list(torch.full((len(ps),), float(step), device=device).unbind())  # torch counts in these
    is_new = grad_avg is None or sqr_avg is None
    if is_new:
        grad_avg, sqr_avg = [torch.zeros_like(p) for p in ps], [torch.zeros_like(p) for p in ps]
    adam(
        ps,
        grads_of(ps),
        grad_avg,
        sqr_avg,
        [],
        kept["steps"],
        fused=kept["fused"],
        has_complex=kept["fused"] is None,  # may be; torch's fused form takes none
        decoupled_weight_decay=decouple_wd,
        amsgrad=False,
        beta1=mom,
        beta2=sqr_mom,
        lr=lr,
        weight_decay=wd if do_wd else 0.0,
        eps=eps,
        maximize=False,
    )
    return {"grad_avg": grad_avg, "sqr_avg": sqr_avg, "step": step + 1} if is_new else {"step": step + 1}


def _noted(ps: list[Tensor], kept: dict[str, Any] | None) -> dict[str, Any]:
    """What torch wants to know of parameters that are alike, found once."""
    kept = {} if kept is None else kept
    kept["fused"], kept["sparse"], kept["absent"] = _fusable(ps[0]), _is_sparse(ps[0]), [None] * len(ps)
    return kept


def _fusable(p: Tensor) -> bool | None:
    """True where torch has a fused form; None: it chooses between its others."""
    plain = type(p) in (Tensor, torch.nn.Parameter) and p.device.type in _FUSED_DEVICES and p.is_floating_point()
    return True if plain and not _is_sparse(p) else None


def _is_sparse(p: Tensor) -> bool:
    return p.grad is not None and p.grad.is_sparse
