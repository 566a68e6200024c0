"""What an optimizer shows: groups of parameters with their hypers, state per parameter, freezing, saving.

`OptimizerFace` is that; `Optimizer` steps by small functions, the classes in `algorithms` by torch's fused functions,
`OptimWrapper` in `wrapper` by an optimizer of torch.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop.optim.schedules import even_mults

#: What `state[p]` holds besides numbers that a step computes; it outlives `clear_state`.
FLAGS = ("do_wd", "force_train")  # False: no weight decay; True: is trained in frozen groups too

#: State that has one value per value of the parameter, by the names used here and in `torch.optim`.
_LIKE_PARAM = {"grad_avg", "sqr_avg", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"}
_LIKE_PARAM |= {"square_avg", "acc_delta", "sum", "prev"}


class OptimizerFace:
    """Groups, hypers and state of an optimizer; a subclass fills in `step`.

    A group is a list of parameters with one dict of hypers (`lr`, `mom`, `sqr_mom`, `eps`, `wd`, ...), the numbers of
    which stay on the host.
    """

    param_lists: Any  # one list of parameters per group
    hypers: Any  # one dict per group
    frozen_idx: int  # groups before this one are frozen

    def __init__(self, params: Any, **defaults: Any):
        self.param_lists = L(L(group) for group in as_groups(params))
        self.hypers = L({} for _ in self.param_lists)
        self._state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._version = 0  # goes up whenever what is kept between steps may no longer hold
        self._required = tuple(defaults)
        self.frozen_idx = 0
        self.set_hypers(**defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient."""
        raise NotImplementedError(f"`{type(self).__name__}` has no `step`.")

    def zero_grad(self) -> None:
        """Sets every gradient to None."""
        for group in self.param_lists:
            for p in group:
                p.grad = None

    # hypers

    def set_hyper(self, name: str, value: Any) -> None:
        """Sets a hyper in every group, and creates it where the name is new.

        `value`: one for all; one per group; `slice(end)` for `end / 10` in all groups but the last; `slice(start, end)`
        for equal factors from the first group to the last.
        """
        for i, v in enumerate(self.per_group(name, value)):
            self._write(i, name, v)

    def set_hypers(self, **hypers: Any) -> None:
        """Sets several hypers: all of them, or none if one is wrong."""
        values = {name: self.per_group(name, value) for name, value in hypers.items()}
        for name, of_groups in values.items():
            for i, v in enumerate(of_groups):
                self._write(i, name, v)

    def _write(self, i: int, name: str, value: Any) -> None:
        self.hypers[i][name] = value

    def per_group(self, name: str, value: Any) -> list[Any]:
        """A value as `set_hyper` takes it, spread over the groups; changes nothing."""
        n = len(self.param_lists)
        if type(value) is float:  # what a schedule sets in every batch
            return [value] * n
        value = _spread(name, value, n) if isinstance(value, slice) else host_number(value)
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            return [value] * n
        values = [host_number(v) for v in value]
        if len(values) not in (1, n):
            raise ValueError(
                f"`{name}` got {len(values)} values, but there are {n} parameter groups; pass one value or {n}."
            )
        return values if len(values) == n else values * n

    def last_group(self) -> Mapping[str, Any]:
        """The live dict in which the last group's `lr` stands."""
        return self.hypers[-1]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups as torch shows them: `params` and the hypers in one dict; what is written into it is set here."""
        pairs = enumerate(zip(self.param_lists, self.hypers, strict=True))
        return [LinkedDict(partial(self._write_group, i), {"params": ps, **hyper}) for i, (ps, hyper) in pairs]

    @param_groups.setter
    def param_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        if len(groups) != len(self.param_lists):
            raise ValueError(f"`param_groups` got {len(groups)} groups; this optimizer has {len(self.param_lists)}.")
        if all("params" in group for group in groups):
            as_groups([list(group["params"]) for group in groups])
        for i, group in enumerate(groups):
            for name, value in group.items():
                self._write_group(i, name, value)

    def _write_group(self, i: int, name: str, value: Any) -> None:
        if name != "params":
            self._write(i, name, host_number(value))
        elif value is not self.param_lists[i]:
            self._write_params(i, list(value))

    def _write_params(self, i: int, params: list[Tensor]) -> None:
        self.param_lists[i] = L(params)
        self._version += 1

    # parameters and what is kept of them

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """A dict per parameter, made on first use; ask for it anew before a change, so that the next step sees it."""
        self._version += 1
        return self._state

    def all_params(self, n: int | slice = slice(None), with_grad: bool = False) -> L:
        """A tuple (parameter, its group, its state, its hypers) for every parameter of groups `n`."""
        state, lists, hypers = self.state, self.param_lists, self.hypers
        found = L((p, lists[i], state[p], hypers[i]) for i in self._chosen(n) for p in lists[i])
        return found.filter(lambda o: o[0].grad is not None) if with_grad else found

    def _chosen(self, n: int | slice) -> Sequence[int]:
        all_groups = range(len(self.param_lists))
        return all_groups[n] if isinstance(n, slice) else [all_groups[n]]

    def clear_state(self) -> None:
        """Forgets what the steps have gathered; keeps the flags `do_wd` and `force_train`."""
        state = self.state
        for p in self._parameters():
            state[p] = {flag: state[p][flag] for flag in FLAGS if flag in state[p]}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_lists for p in group]

    # freezing

    def freeze_to(self, n: int) -> None:
        """Freezes the groups before `n` (counted from the end if negative), except parameters with `force_train`."""
        groups = len(self.param_lists)
        if n < -groups:
            raise ValueError(f"freeze_to({n}) counts back beyond the first of {groups} groups; use {-groups} or more.")
        self.frozen_idx = n if n >= 0 else groups + n
        if self.frozen_idx >= groups:
            warnings.warn(f"freeze_to({n}) freezes all of the {groups} parameter groups.", stacklevel=2)
        self.set_freeze(slice(self.frozen_idx, None), True)
        self.set_freeze(slice(self.frozen_idx), False)

    def freeze(self) -> None:
        """Freezes all groups but the last."""
        if len(self.param_lists) < 2:
            raise ValueError("freeze() keeps only the last group trained, but there is one group; pass a `splitter`.")
        self.freeze_to(-1)

    def unfreeze(self) -> None:
        """Lets every group be trained."""
        self.freeze_to(0)

    def set_freeze(self, n: int | slice, rg: bool, ignore_force_train: bool = False) -> None:
        """Makes the parameters of groups `n` trained (`rg=True`) or frozen; `force_train` wins unless ignored."""
        for p, _, state, _ in self.all_params(n):
            p.requires_grad_(rg or (state.get("force_train", False) and not ignore_force_train))

    # saving

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """`state` of each parameter in order, and `hypers` of each group. Its tensors are the live ones, not copies."""
        return {
            "state": [self._saved_state(p) for p in self._parameters()],
            "hypers": [{name: host_number(v) for name, v in hyper.items()} for hyper in self.hypers],
        }

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave; ValueError, and nothing changed, where that does not fit."""
        self._check_fits(sd)
        for i, hyper in enumerate(sd["hypers"]):
            self._put_hypers(i, hyper)
        pairs = [(p, i) for i, group in enumerate(self.param_lists) for p in group]
        for (p, i), state in zip(pairs, sd["state"], strict=True):
            self._put_state(p, i, state)
        self._version += 1

    def _saved_state(self, p: Tensor) -> dict[str, Any]:
        return dict(self._state[p])

    def _put_state(self, p: Tensor, i: int, state: Mapping[str, Any]) -> None:
        self._state[p] = copied(dict(state), p.device)

    def _put_hypers(self, i: int, hyper: Mapping[str, Any]) -> None:
        self.hypers[i].clear()
        self.hypers[i].update({name: host_number(v) for name, v in hyper.items()})

    def _check_fits(self, sd: Mapping[str, Any]) -> None:
        if not {"state", "hypers"} <= set(sd):
            raise ValueError(
                f"an optimizer's state has `state` and `hypers`; this one has {', '.join(sd) or 'nothing'}."
            )
        if len(sd["hypers"]) != len(self.param_lists):
            raise ValueError(
                f"the state has {len(sd['hypers'])} parameter groups, this optimizer {len(self.param_lists)}; "
                "make it with the splitter that was used when the state was saved."
            )
        if len(sd["state"]) != len(self._parameters()):
            raise ValueError(
                f"the state has {len(sd['state'])} parameters, this optimizer {len(self._parameters())} in groups of "
                f"{', '.join(str(len(group)) for group in self.param_lists)}; it belongs to another model or splitter."
            )
        self._check_names(sd["hypers"])
        self._check_shapes(sd["state"])

    def _check_names(self, hypers: Sequence[Mapping[str, Any]]) -> None:
        for i, hyper in enumerate(hypers):
            missing = [name for name in self._required if name not in hyper]
            if missing:
                raise ValueError(
                    f"group {i} of the state has no {', '.join(missing)}, which {type(self).__name__} needs; "
                    "it belongs to another kind of optimizer."
                )

    def _check_shapes(self, states: Sequence[Mapping[str, Any]]) -> None:
        places = [(i, j, p) for i, group in enumerate(self.param_lists) for j, p in enumerate(group)]
        for (i, j, p), state in zip(places, states, strict=True):
            for name in _LIKE_PARAM.intersection(state):
                value = state[name]
                if isinstance(value, Tensor) and value.shape != p.shape:
                    raise ValueError(
                        f"`{name}` of parameter {j} in group {i} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(p.shape)}; the state belongs to another model or splitter."
                    )

    def __repr__(self) -> str:
        n = len(self.param_lists)
        shown = [self._group_repr(i) for i in range(min(n, 8))] + ([f"  … {n - 8} more"] if n > 8 else [])
        return "\n".join([f"{self._title()}, {n} parameter group{'s' * (n != 1)}", *shown])

    def _title(self) -> str:
        return type(self).__name__

    def _group_repr(self, i: int) -> str:
        params, hyper = self.param_lists[i], self.hypers[i]
        numbers = [f"{name}={v:.4g}" for name, v in hyper.items() if type(v) in (int, float)]
        values = sum(p.numel() for p in params)
        frozen = ["frozen"] if i < self.frozen_idx else []
        return f"  {i}: " + ", ".join([f"{len(params)} tensors with {values:,} values", *numbers, *frozen])


class LinkedDict(dict[str, Any]):
    """A dict that also hands each item set in it to `write(name, value)`."""

    def __init__(self, write: Callable[[str, Any], None], items: Mapping[str, Any]):
        super().__init__(items)
        self._write = write

    def __setitem__(self, name: str, value: Any) -> None:
        self._write(name, value)
        super().__setitem__(name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy belongs to no optimizer


def as_groups(params: Any) -> list[list[Tensor]]:
    """Parameters, or lists of them, as a list of groups; no group at all and a parameter given twice are errors."""
    items = listed(params)
    nested = bool(items) and all(_is_group(item) for item in items)
    groups = [list(group) for group in items] if nested else [items]
    where: dict[Tensor, int] = {}
    for i, group in enumerate(groups):
        for p in group:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"parameter group {i} holds {type(p).__name__}; pass a list of parameters or a list of such lists."
                )
            if p in where:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is in group {where[p]} and again in group {i}; "
                    "let the splitter name each parameter once."
                )
            where[p] = i
    if not where:
        raise ValueError("an optimizer needs at least one parameter, but got none; is the whole model frozen or empty?")
    return groups


def listed(params: Any) -> list[Any]:
    """What an optimizer was given, as a list: of parameters, of groups, or of torch's dicts."""
    if not isinstance(params, Iterable):
        raise TypeError(f"an optimizer needs a list of parameters, but got {type(params).__name__}.")
    return [params] if isinstance(params, Tensor) else list(params)


def _is_group(item: Any) -> bool:
    return isinstance(item, Iterable) and not isinstance(item, (Tensor, Mapping, str, torch.nn.Module))


def host_number(value: Any) -> Any:
    """A numpy or torch scalar as a plain number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def copied(value: Any, device: torch.device) -> Any:
    """A copy of nested dicts, lists and tuples that shares no tensor with them; tensors come to `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {k: copied(v, device) for k, v in value.items()}
    return type(value)(copied(v, device) for v in value) if isinstance(value, (list, tuple)) else value


def _spread(name: str, value: slice, n: int) -> Any:
    if value.stop is None:
        raise ValueError(f"`{name}` got {value}; use slice(end) or slice(start, end).")
    if value.start is None:
        return [value.stop / 10] * (n - 1) + [value.stop]
    return even_mults(value.start, value.stop, n)


class Optimizer(OptimizerFace):
    """Steps by small functions, its `cbs`: each gets the parameter, and by keyword its state and the hypers.

    A dict that one returns updates the parameter's state; an attribute `defaults` on it holds default hypers.
    """

    def __init__(self, params: Any, cbs: Any, train_bn: bool = True, **defaults: Any):
        if not train_bn:
            warnings.warn("`train_bn` has no effect here; pass it to the Learner.", stacklevel=2)
        self.cbs = L(cbs)
        known = {name: v for cb in self.cbs for name, v in _defaults_of(cb).items()}
        super().__init__(params, **{**known, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Runs every function of `cbs` on every parameter that has a gradient and is not frozen."""
        refuse_closure(closure)
        for p, _, state, hyper in self.all_params(with_grad=True):
            for cb in self.cbs if p.requires_grad else ():
                new = cb(p, **{**state, **hyper})
                if isinstance(new, dict):
                    state.update(new)


def _defaults_of(cb: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(cb, partial) and not hasattr(cb, "defaults"):
        cb = cb.func
    return getattr(cb, "defaults", {})


def refuse_closure(closure: Callable[[], Any] | None) -> None:
    """An error for who passes a closure to a step that would not call it."""
    if closure is not None:
        raise NotImplementedError("this `step` takes no closure; wrap an optimizer of torch that does in OptimWrapper.")
