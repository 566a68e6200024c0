"""Parameters that are stepped together: which they are, and how steppers run over them."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: What `state[p]` holds besides what steps compute; it outlives `clear_state`.
FLAGS = ("do_wd", "force_train", "is_hidden")  # no weight decay if False; trained when frozen; stepped by Muon

#: State that is one value for all parameters that are stepped together; of anything else each has its own.
_SHARED = (bool, int, float, complex, str, type(None))

_AT_HAND = 2**17  # values: with Adam's steppers, 25 million take some 0.6 of the time of all at once


@dataclass(slots=True, eq=False)
class Call:
    """Parameters of one group that are alike in device, precision, and the flags and numbers in their state."""

    hypers: dict[str, Any]  # the live dict of their group
    params: list[Any] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)  # the states as steppers over lists get them
    n_values: int = 0
    steppers: list[Callable[..., Any]] = field(default_factory=list)  # each a function of the list and keywords

    def is_full_with(self, p: Tensor) -> bool:
        """Whether one more parameter would be more than a processor keeps at hand from one stepper to the next."""
        return p.device.type == "cpu" and self.n_values + p.numel() > _AT_HAND

    def add(self, p: Tensor, state: dict[str, Any]) -> None:
        self.params.append(p)
        self.states.append(state)
        self.n_values += p.numel()

    def read_states(self) -> None:
        """Makes the columns; `kept` is what steppers keep beside the state while this call lasts."""
        columns = {
            name: value if isinstance(value, _SHARED) else [state[name] for state in self.states]
            for name, value in self.states[0].items()
        }
        self.columns = {**columns, "kept": {}}

    def take(self, new: Mapping[str, Any]) -> None:
        """Puts into each parameter's state what a stepper returned: lists item by item, anything else as it is."""
        for name, value in new.items():
            if isinstance(value, (list, tuple)):
                if value is not self.columns.get(name):  # else it was changed in place
                    self._take_list(name, list(value))
            else:
                self.columns[name] = value
                for state in self.states:
                    state[name] = value

    def _take_list(self, name: str, values: list[Any]) -> None:
        if len(values) != len(self.states):
            raise ValueError(f"a stepper returned {len(values)} values of `{name}` for {len(self.states)} parameters.")
        self.columns[name] = values
        for state, value in zip(self.states, values, strict=True):
            state[name] = value


def resolved(stepper: Any, call: Call) -> Callable[..., Any]:
    """A stepper as a function of lists, without the layers around it: each would cost microseconds in every batch."""
    inner, fixed = _unwrapped(stepper)
    over_list = getattr(inner, "over_list", None)
    if over_list is None:
        return functools.partial(_one_by_one, stepper, call)
    return functools.partial(over_list, **fixed) if fixed else over_list


def takes_lists(stepper: Any) -> bool:
    """Whether a stepper, or what it is a partial of, was marked as one over lists."""
    return hasattr(_unwrapped(stepper)[0], "over_list")


def _unwrapped(stepper: Any) -> tuple[Any, dict[str, Any]]:
    fixed: dict[str, Any] = {}
    while isinstance(stepper, functools.partial) and not stepper.args:
        stepper, fixed = stepper.func, {**stepper.keywords, **fixed}
    return stepper, fixed


def _one_by_one(stepper: Callable[..., Any], call: Call, params: list[Any], **_: Any) -> None:
    for p, state in zip(params, call.states, strict=True):
        new = stepper(p, **{**state, **call.hypers})
        if isinstance(new, dict):
            state.update(new)


class Calls:
    """The calls of a step, kept from one step to the next while the same parameters are stepped in the same way."""

    def __init__(self) -> None:
        self._key: Any = None
        self._made: list[Call] | None = []  # None: they are made anew for each stepper

    def __reduce__(self) -> Any:
        return Calls, ()  # a copy of an optimizer makes its own

    def of(self, opt: Any) -> Iterable[Call]:
        """The calls for the gradients and flags as they are now."""
        key: list[Any] = [opt._version, *opt.cbs]
        for params, hyper in zip(opt.param_lists, opt.hypers, strict=True):
            key.append(id(hyper))
            key += _decays(params, opt._state) if hyper.get("wd") else _live(params)
        if key != self._key:
            is_mixed = not all(map(takes_lists, opt.cbs))
            self._made = None if is_mixed else made_calls(opt.param_lists, opt.hypers, opt._state, opt.cbs)
            self._key = key
        return self._one_stepper_each(opt) if self._made is None else self._made

    @staticmethod
    def _one_stepper_each(opt: Any) -> Iterator[Call]:
        # What a plain stepper returns may tell parameters apart that were alike: sorted anew for each stepper.
        for stepper in opt.cbs:
            yield from made_calls(opt.param_lists, opt.hypers, opt._state, [stepper])


def made_calls(
    param_lists: Sequence[Any],
    hypers: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    steppers: Sequence[Any],
) -> list[Call]:
    """A call for all parameters that take a step and are alike."""
    calls: list[Call] = []
    open_calls: dict[Any, Call] = {}
    for i, (params, hyper) in enumerate(zip(param_lists, hypers, strict=True)):
        for p in params:
            if p.grad is not None and p.requires_grad:
                kind = (i, *_kind(p, states[p]))
                call = open_calls.get(kind)
                if call is None or (len(steppers) > 1 and call.is_full_with(p)):
                    call = open_calls[kind] = Call(hyper)
                    calls.append(call)
                call.add(p, states[p])
    for call in calls:
        call.read_states()
        call.steppers = [resolved(stepper, call) for stepper in steppers]
    return calls


def _kind(p: Tensor, state: Mapping[str, Any]) -> tuple[Any, ...]:
    # Tensors by name only: where one parameter has an average and another none, they are not alike.
    kept = [(name, v if isinstance(v, _SHARED) else None) for name, v in state.items()]
    return type(p), p.device, p.dtype, p.grad is not None and p.grad.is_sparse, *sorted(kept)


def _decays(params: Any, states: Any) -> list[bool | None]:
    """Per parameter whether weight decay acts on it; None: it takes no step."""
    return [states[p].get("do_wd", True) if p.grad is not None and p.requires_grad else None for p in params]


def _live(params: Any) -> list[bool | None]:
    return [True if p.grad is not None and p.requires_grad else None for p in params]
