"""Parameters that are stepped together: which they are, and how steppers run over them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: What `state[p]` holds besides what steps compute; it outlives `clear_state`.
FLAGS = ("do_wd", "force_train", "is_hidden")  # no weight decay if False; trained when frozen; stepped by Muon


@dataclass(slots=True, eq=False)
class Call:
    """Parameters of one group that are alike in device, precision, and the flags and numbers in their state."""

    group: int
    params: list[Any]
    states: list[dict[str, Any]]
    columns: dict[str, Any] | None = None  # the states as steppers over lists get them; None: to be made anew
    kept: dict[str, Any] = field(default_factory=dict)  # what steppers keep beside the state, while this call lasts

    def run(self, stepper: Callable[..., Any], hypers: Mapping[str, Any]) -> None:
        """One stepper over all parameters: at once if it takes lists, else one by one."""
        if takes_lists(stepper):
            columns = self.columns if self.columns is not None else self._made_columns()
            new = stepper(self.params, **{**columns, **hypers})
            if isinstance(new, dict):
                self._take(new, columns)
            return
        for p, state in zip(self.params, self.states, strict=True):
            new = stepper(p, **{**state, **hypers})
            if isinstance(new, dict):
                state.update(new)
                self.columns = None

    def _made_columns(self) -> dict[str, Any]:
        names = dict.fromkeys(name for state in self.states for name in state)
        columns = {name: _column([state.get(name) for state in self.states]) for name in names}
        self.columns = {**columns, "kept": self.kept}
        return self.columns

    def _take(self, new: Mapping[str, Any], columns: dict[str, Any]) -> None:
        for name, value in new.items():
            if value is columns.get(name) and isinstance(value, list):
                continue  # changed in place
            columns[name] = value
            values = value if isinstance(value, list) else [value] * len(self.states)
            for state, v in zip(self.states, values, strict=True):
                state[name] = v


def _column(values: list[Any]) -> Any:
    first = values[0]
    alike = not isinstance(first, Tensor) and all(type(v) is type(first) and v == first for v in values)
    return first if alike else values


def takes_lists(stepper: Any) -> bool:
    """Whether a stepper, or what it is a partial of, was marked as one over lists."""
    while isinstance(stepper, functools.partial):
        stepper = stepper.func
    return getattr(stepper, "takes_lists", False)


class Calls:
    """The calls of a step, kept from one step to the next while the same parameters are stepped in the same way."""

    def __init__(self) -> None:
        self._key: Any = None
        self._made: list[Call] = []

    def __reduce__(self) -> Any:
        return Calls, ()  # a copy of an optimizer makes its own

    def of(self, opt: Any) -> list[Call]:
        """The calls for the gradients and flags as they are now."""
        key: list[Any] = [opt._version]
        for params, hyper in zip(opt.param_lists, opt.hypers, strict=True):
            key += _decays(params, opt._state) if hyper.get("wd") else _live(params)
        if key != self._key:
            self._made = made_calls(opt.param_lists, opt._state)
            self._key = key
        return self._made


def made_calls(param_lists: Sequence[Any], states: Mapping[Tensor, dict[str, Any]]) -> list[Call]:
    """A call for all parameters that take a step and are alike."""
    calls: dict[Any, Call] = {}
    for i, params in enumerate(param_lists):
        for p in params:
            if p.grad is not None and p.requires_grad:
                call = calls.setdefault((i, *_kind(p, states[p])), Call(i, [], []))
                call.params.append(p)
                call.states.append(states[p])
    return list(calls.values())


def _kind(p: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...]:
    # Tensors by name only: where one parameter has an average and another none, they are not alike.
    kept = [(name, None if isinstance(v, (Tensor, list, dict)) else v) for name, v in state.items()]
    return type(p), p.device, p.dtype, p.grad is not None and p.grad.is_sparse, *sorted(kept)


def _decays(params: Any, states: Any) -> list[bool | None]:
    """Per parameter whether weight decay acts on it; None: it takes no step."""
    return [states[p].get("do_wd", True) if p.grad is not None and p.requires_grad else None for p in params]


def _live(params: Any) -> list[bool | None]:
    return [True if p.grad is not None and p.requires_grad else None for p in params]
