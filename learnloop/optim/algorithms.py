"""Optimizers with the numbers of fastai and the speed of torch: its fused functions over our own state."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from learnloop.optim.optimizer import OptimizerFace, refuse_closure

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


class SGD(OptimizerFace):
    """Stochastic gradient descent; with `mom`, along a sum of gradients in which each step shrinks the older ones.

    Made with `mom=0` it stays without momentum, whatever is set later. The gradient enters the sum in full
    (undampened). `decouple_wd`: decay shrinks weights by `lr * wd` (Loshchilov and Hutter, arXiv 1711.05101);
    else `wd` times the weight is added to the gradient.
    """

    def __init__(self, params: Any, lr: Any, mom: Any = 0.0, wd: Any = 0.0, decouple_wd: bool = True):
        super().__init__(params, lr=lr, mom=mom, wd=wd)
        self.decouple_wd = decouple_wd
        self.has_momentum = any(hyper["mom"] != 0 for hyper in self.hypers)
        self._calls = Calls(("grad_avg",) if self.has_momentum else ())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Updates every parameter that has a gradient and is not frozen."""
        refuse_closure(closure)
        for call in self._calls.of(self):
            hyper = self.hypers[call.group]
            lr, wd = hyper["lr"], hyper["wd"] if call.decays else 0.0
            if wd and self.decouple_wd and (self.has_momentum or call.sparse):
                torch._foreach_mul_(call.params, 1 - lr * wd)
                wd = 0.0  # without momentum the gradient's way is the same: p - lr * (grad + wd * p)
            sgd(
                call.params,
                [p.grad for p in call.params],
                call.averages["grad_avg"] if self.has_momentum else call.absent,
                has_sparse_grad=call.sparse,
                fused=call.fused,
                weight_decay=wd,
                # At 0 torch leaves the average alone; it must become the gradient, as it does at the smallest number.
                momentum=(hyper["mom"] or sys.float_info.min) if self.has_momentum else 0.0,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )


class Adam(OptimizerFace):
    """Adam (arXiv 1412.6980), with decoupled weight decay (AdamW, arXiv 1711.05101) unless `decouple_wd=False`.

    torch's update is fastai's, number for number: averages dampened, `eps` added after the correction of both.
    """

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.9,  # of the average of gradients
        sqr_mom: Any = 0.99,  # of the average of their squares
        eps: Any = 1e-5,
        wd: Any = 0.01,
        decouple_wd: bool = True,
    ):
        super().__init__(params, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
        self.decouple_wd = decouple_wd
        self._calls = Calls(("grad_avg", "sqr_avg"), counted=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Updates every parameter that has a gradient and is not frozen."""
        refuse_closure(closure)
        for call in self._calls.of(self):
            hyper = self.hypers[call.group]
            adam(
                call.params,
                [p.grad for p in call.params],
                call.averages["grad_avg"],
                call.averages["sqr_avg"],
                [],
                call.steps,
                fused=call.fused,
                has_complex=call.fused is None,  # may be; torch's fused form takes none
                decoupled_weight_decay=self.decouple_wd,
                amsgrad=False,
                beta1=hyper["mom"],
                beta2=hyper["sqr_mom"],
                lr=hyper["lr"],
                weight_decay=hyper["wd"] if call.decays else 0.0,
                eps=hyper["eps"],
                maximize=False,
            )
            for state in call.states:
                state["step"] += 1


@dataclass(slots=True)
class Call:
    """What one call of a torch function gets: parameters alike in group, decay and device, their state beside them."""

    group: int
    decays: bool
    fused: bool | None  # None: torch chooses between its other forms
    sparse: bool  # gradients are
    params: list[Any] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    averages: dict[str, list[Any]] = field(default_factory=dict)
    steps: list[Tensor] = field(default_factory=list)  # `state["step"]` where torch needs it: in tensors on the device
    absent: list[Any] = field(default_factory=list)  # None for each: torch asks for averages that are not kept


class Calls:
    """The calls of a step, kept from one step to the next while the same parameters are stepped in the same way."""

    def __init__(self, averages: tuple[str, ...], counted: bool = False):
        self.averages = averages  # names of the state that starts as zeros in the parameter's shape
        self.counted = counted  # whether state has `step`
        self._key: Any = None
        self._kept: list[Call] = []

    def of(self, opt: OptimizerFace) -> list[Call]:
        """The calls for the gradients and flags as they are now."""
        key: list[Any] = [opt._version]
        for params, hyper in zip(opt.param_lists, opt.hypers, strict=True):
            key += _decays(params, opt._state) if hyper["wd"] else _live(params)
        if key != self._key:
            self._kept = self._made(opt, key[1:])
            self._key = key
        return self._kept

    def _made(self, opt: OptimizerFace, decays: list[bool | None]) -> list[Call]:
        places = [(i, p) for i, params in enumerate(opt.param_lists) for p in params]
        calls: dict[Any, Call] = {}
        for (i, p), decay in zip(places, decays, strict=True):
            if decay is not None:
                fused, sparse = _fusable(p), p.grad is not None and p.grad.is_sparse
                alike = (i, decay, fused, sparse, p.device)
                call = calls.setdefault(alike, Call(i, decay, fused, sparse))
                call.params.append(p)
                call.states.append(opt._state[p])
        for call in calls.values():
            self._fill(call)
        return list(calls.values())

    def _fill(self, call: Call) -> None:
        call.absent = [None] * len(call.params)
        for p, state in zip(call.params, call.states, strict=True):
            for name in self.averages:
                if name not in state:
                    state[name] = torch.zeros_like(p)
        call.averages = {name: [state[name] for state in call.states] for name in self.averages}
        if self.counted:
            counts = [float(state.setdefault("step", 0)) for state in call.states]
            device = call.params[0].device if call.fused else "cpu"
            call.steps = list(torch.tensor(counts).to(device).unbind())


def _decays(params: Any, state: Any) -> list[bool | None]:
    """Per parameter whether weight decay acts on it; None: it takes no step."""
    return [state[p].get("do_wd", True) if p.grad is not None and p.requires_grad else None for p in params]


def _live(params: Any) -> list[bool | None]:
    return [True if p.grad is not None and p.requires_grad else None for p in params]


def _fusable(p: Tensor) -> bool | None:
    plain = type(p) in (Tensor, torch.nn.Parameter) and p.device.type in _FUSED_DEVICES and p.is_floating_point()
    return True if plain and p.grad is not None and not p.grad.is_sparse else None
