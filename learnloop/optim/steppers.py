"""Steppers: the small functions that an optimizer's step is made of.

Each gets a parameter, or a list of them, and by keyword the hypers and their state; it changes the parameters in place
and may return a dict of new state. Those here take both; over a list they use torch's functions for lists.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def list_stepper(stepper: Callable[..., Any] | None = None, /, **defaults: Any) -> Callable[..., Any]:
    """Marks a stepper that takes lists: `@list_stepper` or `@list_stepper(mom=0.9)`, with default hypers.

    It gets a list of parameters of one group, state as lists of tensors in the same order, and numbers and hypers once:
    parameters whose numbers differ come in calls of their own. It may be called with one parameter too.
    """
    if stepper is None:
        return functools.partial(list_stepper, **defaults)

    @functools.wraps(stepper)
    def either(p: Any, *args: Any, **kwargs: Any) -> Any:
        return stepper(p, *args, **kwargs) if isinstance(p, list) else _on_one(stepper, p, args, kwargs)

    either.over_list, either.defaults = stepper, defaults  # type: ignore[attr-defined]
    return either


def _on_one(stepper: Callable[..., Any], p: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = list(inspect.signature(stepper).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    with torch.no_grad():
        new = stepper([p], **{name: [v] if isinstance(v, Tensor) else v for name, v in given.items()})
    return {name: v[0] if isinstance(v, list) else v for name, v in new.items()} if isinstance(new, dict) else new


def debias(mom: float, damp: float, step: int) -> float:
    """What the sum of the weights in a moving average is after so many steps: divides its bias away."""
    return damp * (1 - mom**step) / (1 - mom)


# Weight decay


@list_stepper(wd=0.0)
def weight_decay(ps: list[Tensor], lr: float, wd: float, do_wd: bool = True, **kwargs: Any) -> None:
    """Shrinks parameters by `lr * wd`: decoupled from the gradient (Loshchilov and Hutter, arXiv 1711.05101)."""
    if do_wd and wd != 0:
        torch._foreach_mul_(ps, 1 - lr * wd)


@list_stepper(wd=0.0)
def l2_reg(ps: list[Tensor], wd: float, do_wd: bool = True, **kwargs: Any) -> None:
    """Adds `wd` times the parameter to its gradient, in place."""
    if do_wd and wd != 0:
        torch._foreach_add_(grads_of(ps), ps, alpha=wd)


# Averages


@list_stepper(mom=0.9)
def average_grad(
    ps: list[Tensor], mom: float, dampening: bool = False, grad_avg: list[Tensor] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """`grad_avg`, in which each step shrinks older gradients to `mom`; with `dampening` an average, else a sum."""
    grad_avg = _zeros(ps) if grad_avg is None else grad_avg
    if dampening:
        torch._foreach_lerp_(grad_avg, grads_of(ps), 1 - mom)
    else:
        torch._foreach_mul_(grad_avg, mom)
        torch._foreach_add_(grad_avg, grads_of(ps))
    return {"grad_avg": grad_avg}


@list_stepper(sqr_mom=0.99)
def average_sqr_grad(
    ps: list[Tensor], sqr_mom: float, dampening: bool = True, sqr_avg: list[Tensor] | None = None, **kwargs: Any
) -> dict[str, Any]:
    """`sqr_avg`: as `average_grad`, of the gradients' squares."""
    sqr_avg, grads = _zeros(ps) if sqr_avg is None else sqr_avg, grads_of(ps)
    torch._foreach_mul_(sqr_avg, sqr_mom)
    torch._foreach_addcmul_(sqr_avg, grads, grads, value=1 - sqr_mom if dampening else 1.0)
    return {"sqr_avg": sqr_avg}


@list_stepper
def step_stat(ps: list[Tensor], step: int = 0, **kwargs: Any) -> dict[str, Any]:
    """`step`: how many steps a parameter has taken."""
    return {"step": step + 1}


# Steps


@list_stepper
def sgd_step(ps: list[Tensor], lr: float, **kwargs: Any) -> None:
    """Down the gradient."""
    torch._foreach_add_(ps, grads_of(ps), alpha=-lr)


@list_stepper
def momentum_step(ps: list[Tensor], lr: float, grad_avg: list[Tensor], **kwargs: Any) -> None:
    """Down the sum or average of gradients."""
    torch._foreach_add_(ps, grad_avg, alpha=-lr)


@list_stepper(eps=1e-8)
def rms_prop_step(
    ps: list[Tensor],
    lr: float,
    sqr_avg: list[Tensor],
    eps: float,
    grad_avg: list[Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Down the gradient, or its average, over the root of the average square."""
    denom = torch._foreach_sqrt(sqr_avg)
    torch._foreach_add_(denom, eps)
    torch._foreach_addcdiv_(ps, grads_of(ps) if grad_avg is None else grad_avg, denom, value=-lr)


@list_stepper(eps=1e-5)
def adam_step(
    ps: list[Tensor],
    lr: float,
    mom: float,
    step: int,
    sqr_mom: float,
    grad_avg: list[Tensor],
    sqr_avg: list[Tensor],
    eps: float,
    **kwargs: Any,
) -> None:
    """Adam (arXiv 1412.6980): both averages dampened, corrected, and `eps` added after the correction."""
    denom = _corrected_root(sqr_avg, sqr_mom, step)
    torch._foreach_add_(denom, eps)
    torch._foreach_addcdiv_(ps, grad_avg, denom, value=-lr / debias(mom, 1 - mom, step))


@list_stepper(eps=1e-5, beta=0.0)
def radam_step(
    ps: list[Tensor],
    lr: float,
    mom: float,
    step: int,
    sqr_mom: float,
    grad_avg: list[Tensor],
    sqr_avg: list[Tensor],
    eps: float,
    beta: float,
    **kwargs: Any,
) -> None:
    """Rectified Adam (arXiv 1908.03265): without adaptive rates while they rest on few steps.

    `beta` above 0 puts the denominator through a softplus of that sharpness (SAdam, arXiv 1908.00700).
    """
    rate = lr / debias(mom, 1 - mom, step)
    share = _rectified(sqr_mom, step)
    if share is None:
        torch._foreach_add_(ps, grad_avg, alpha=-rate)
        return
    denom = _corrected_root(sqr_avg, sqr_mom, step)
    torch._foreach_add_(denom, eps)
    if beta:
        denom = [F.softplus(d, beta) for d in denom]
    torch._foreach_addcdiv_(ps, grad_avg, denom, value=-rate * share)


def _rectified(sqr_mom: float, step: int) -> float | None:
    """The share of the rate that the variance of so many squares allows; None where there are too few."""
    longest = 2 / (1 - sqr_mom) - 1
    r = longest - 2 * step * sqr_mom**step / (1 - sqr_mom**step)
    return math.sqrt((r - 4) * (r - 2) * longest / ((longest - 4) * (longest - 2) * r)) if r > 5 else None


@list_stepper(eps=1e-8, nu_1=0.7, nu_2=1.0)
def qhadam_step(
    ps: list[Tensor],
    lr: float,
    mom: float,
    sqr_mom: float,
    sqr_avg: list[Tensor],
    nu_1: float,
    nu_2: float,
    step: int,
    grad_avg: list[Tensor],
    eps: float,
    **kwargs: Any,
) -> None:
    """Quasi-hyperbolic Adam (arXiv 1810.06801): shares `nu` of the averages, the rest from the gradient itself."""
    grads = grads_of(ps)
    numer = torch._foreach_mul(grad_avg, nu_1 / debias(mom, 1 - mom, step))
    torch._foreach_add_(numer, grads, alpha=1 - nu_1)
    denom = torch._foreach_mul(sqr_avg, nu_2 / debias(sqr_mom, 1 - sqr_mom, step))
    if nu_2 != 1:
        torch._foreach_addcmul_(denom, grads, grads, value=1 - nu_2)
    torch._foreach_sqrt_(denom)
    torch._foreach_add_(denom, eps)
    torch._foreach_addcdiv_(ps, numer, denom, value=-lr)


@list_stepper(trust_coeff=0.02, wd=0.0, eps=1e-8)
def larc_layer_lr(
    ps: list[Tensor], lr: float, trust_coeff: float, wd: float, eps: float, clip: bool = True, **kwargs: Any
) -> dict[str, Any]:
    """`local_lr`: a rate per parameter from the norms of its value and gradient; with `clip` at most `lr`.

    LARC with `clip`, without it LARS (arXiv 1708.03888). The rates are tensors: nothing waits for the device.
    """
    norm, of_grad = torch.stack(torch._foreach_norm(ps)), torch.stack(torch._foreach_norm(grads_of(ps)))
    rates = lr * trust_coeff * norm / (of_grad + norm * wd + eps)
    return {"local_lr": list((rates.clamp(max=lr) if clip else rates).unbind())}


@list_stepper
def larc_step(ps: list[Tensor], local_lr: list[Tensor], grad_avg: list[Tensor] | None = None, **kwargs: Any) -> None:
    """Down the gradient, or its average, by the rate of each parameter."""
    torch._foreach_sub_(ps, torch._foreach_mul(grads_of(ps) if grad_avg is None else grad_avg, local_lr))


@list_stepper(eps=1e-6, wd=0.0)
def lamb_step(
    ps: list[Tensor],
    lr: float,
    mom: float,
    step: int,
    sqr_mom: float,
    grad_avg: list[Tensor],
    sqr_avg: list[Tensor],
    eps: float,
    **kwargs: Any,
) -> None:
    """Adam's step, scaled per parameter to the size of its value, at most ten times (LAMB, arXiv 1904.00962)."""
    denom = _corrected_root(sqr_avg, sqr_mom, step)
    torch._foreach_add_(denom, eps)
    steps = torch._foreach_div(grad_avg, denom)
    torch._foreach_mul_(steps, 1 / debias(mom, 1 - mom, step))
    size, of_step = torch.stack(torch._foreach_norm(ps)), torch.stack(torch._foreach_norm(steps))
    scale = torch.where((size == 0) | (of_step == 0), 1.0, (size / of_step).clamp(max=10))
    torch._foreach_sub_(ps, torch._foreach_mul(steps, list((scale * lr).unbind())))


@list_stepper(avg_mom=0.99)
def lion_step(
    ps: list[Tensor],
    lr: float,
    mom: float,
    avg_mom: float,
    grad_avg: list[Tensor] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """By `lr` against the sign of a mix of average and gradient; keeps the average (Lion, arXiv 2302.06675)."""
    grad_avg, grads = _zeros(ps) if grad_avg is None else grad_avg, grads_of(ps)
    directions = torch._foreach_lerp(grad_avg, grads, 1 - mom)
    torch._foreach_sign_(directions)
    torch._foreach_add_(ps, directions, alpha=-lr)
    torch._foreach_lerp_(grad_avg, grads, 1 - avg_mom)
    return {"grad_avg": grad_avg}


def _corrected_root(sqr_avg: list[Tensor], sqr_mom: float, step: int) -> list[Tensor]:
    denom = list(torch._foreach_sqrt(sqr_avg))
    torch._foreach_div_(denom, math.sqrt(debias(sqr_mom, 1 - sqr_mom, step)))
    return denom


def grads_of(ps: list[Tensor]) -> list[Any]:
    """The gradient of each parameter."""
    return [p.grad for p in ps]


def _zeros(ps: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) for p in ps]
