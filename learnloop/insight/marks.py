"""Marks for everything that a handler can write on a learner: two of them differ where something was written."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learnloop.loop.callback import Callback

_SAMPLED = 16  # numbers of a tensor, its first, by which a change shows that went past torch's own count of changes
_MANY = 100  # entries of a container that are looked at


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of what was written between two looks."""
    found = {name for name in before.keys() | after.keys() if [before.get(name)] != [after.get(name)]}
    return {name for name in found if name not in ("loss", "loss_grad") or not _was_only_read(before, after, name)}


def _was_only_read(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    """A loss comes into being when it is read; only one that was changed after that was written."""
    mark = after.get(name)
    return before.get(name) is None and isinstance(mark, _Mark) and mark.version == 0


def look(learn: Any) -> dict[str, Any]:
    """A mark for everything that a handler can write, by name; two marks differ where that was written."""
    own, model, opt = vars(learn), learn.model, learn.opt
    found = {n: _mark(v) for n, v in own.items() if _is_shown(n) and not isinstance(v, Callback)}
    found |= {"loss": _mark(own.get("_loss")), "loss_grad": _mark(own.get("_loss_grad"))}
    found["cbs"] = _mark(list(learn.cbs))
    found["metrics"] = _mark(list(learn.metrics)) if hasattr(learn, "metrics") else None
    if isinstance(model, nn.Module):
        found |= _of_model(model)
    if opt is not None:
        found |= _of_opt(opt)
    for cb in learn.cbs:
        found |= {f"{cb.name}.{n}": _mark(v) for n, v in _public(cb)}
    found["random state"] = _random_state()
    devices = ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    found["autocast"] = [torch.is_autocast_enabled(device) for device in devices]
    return found


def _is_shown(name: str) -> bool:
    return not name.startswith("_") and name not in ("learn", "batch")  # what is in a batch is in xb and yb


def _public(cb: Any) -> Iterator[tuple[str, Any]]:
    """Attributes, and what lies behind a property that can be set."""
    for name, value in vars(cb).items():
        if _is_shown(name):
            yield name, value
        elif getattr(getattr(type(cb), name[1:], None), "fset", None) is not None:
            yield name[1:], value


def _random_state() -> Any:
    """A number for the states of the generators of python, numpy, torch and CUDA."""
    numpy_state: Any = np.random.get_state(legacy=True)
    is_on = torch.cuda.is_available() and torch.cuda.is_initialized()
    of_torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if is_on else ())]
    return hash((random.getstate(), numpy_state[1].tobytes(), *numpy_state[2:], *(bytes(s.numpy()) for s in of_torch)))


def _of_model(model: nn.Module) -> dict[str, Any]:
    params, modules = list(model.parameters()), list(model.modules())
    return {
        "parameters": [_Mark(p) for p in params],
        "buffers": [_Mark(b) for b in model.buffers()],
        "gradients": [_mark(p.grad) for p in params],
        "requires_grad": [p.requires_grad for p in params],
        "model.training": [m.training for m in modules],
        "hooks": [_hooks(m) for m in modules],
        **{f"model.{name}": value for name, value in _own_attributes(modules)},
    }


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_FORWARD = {"forward": "forward", "_compiled_call_impl": "forward"}


def _hooks(module: nn.Module) -> list[list[int]]:
    return [list(getattr(module, name)) for name in _HOOKS]


def _own_attributes(modules: list[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Attributes that modules have beside parameters, buffers and children: what they carry, and how they run."""
    found: dict[str, list[Any]] = {}
    for module in modules:
        for name, value in vars(module).items():
            shown = _FORWARD.get(name, name)
            if not shown.startswith("_") and name not in ("training", "train"):
                found.setdefault(shown, []).append(_mark(value))
    yield from found.items()


def _of_opt(opt: Any) -> dict[str, Any]:
    hypers = list(getattr(opt, "hypers", ()))
    names = dict.fromkeys(name for group in hypers for name in group)
    state = [(id(p), _of_state(s)) for p, s in getattr(opt, "state", {}).items() if s]
    return {**{f"opt.{n}": [group.get(n) for group in hypers] for n in names}, "opt.state": state}


def _of_state(state: Any) -> list[Any]:
    values = state.values() if isinstance(state, dict) else [state]
    return [(id(v), v._version) if isinstance(v, Tensor) else v for v in values]


class _Same:
    """Equal to a mark of the very same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Mark(_Same):
    """Equal to a mark of the same tensor with the same numbers in the same place."""

    def __init__(self, value: Tensor):
        super().__init__(value)
        self.version = None if value.is_inference() else value._version
        self.numbers = _sample(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Mark) or self.value is not other.value:
            return False
        return self.version == other.version and self.numbers == other.numbers

    __hash__ = None


def _mark(value: Any, depth: int = 2) -> Any:
    if isinstance(value, Tensor):
        return _Mark(value)
    if depth and isinstance(value, (list, tuple)) and len(value) <= _MANY:
        return [type(value), *(_mark(v, depth - 1) for v in value)]
    if depth and isinstance(value, dict) and len(value) <= _MANY:
        return {key: _mark(v, depth - 1) for key, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else _Same(value)


def _sample(t: Tensor) -> tuple[Any, ...]:
    """The place of a tensor in memory and some of its numbers: `p.data` is written past the count of changes."""
    if t.layout is not torch.strided or t.is_meta or not t.numel():
        return ()
    row = t.detach()
    while row.ndim > 1:
        row = row[0]
    some = row.reshape(-1)[:_SAMPLED].contiguous().cpu()
    return t.data_ptr(), t.stride(), bytes(some.view(torch.uint8).numpy())
