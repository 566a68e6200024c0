"""The optimizer: groups of parameters with their hypers, state per parameter, and a step made of steppers.

The classes in `algorithms` are this one with their steppers; `OptimWrapper` in `wrapper` and `Lookahead` show another
optimizer with the same face.
"""

import functools
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop import html
from learnloop.optim.calls import FLAGS, Calls
from learnloop.optim.groups import Group, as_groups, summary_of
from learnloop.optim.hypers import LinkedDict, checked, host_number, merged, spread
from learnloop.optim.saved import check_fits, copied, shapes_of

#: Hypers that every optimizer takes, whether a stepper of it reads them or not: a Learner and its schedules set them.
COMMON = ("lr", "mom", "wd")


class Optimizer:
    """Steps by small functions, its `cbs`: `Optimizer(params, [weight_decay, sgd_step], lr=0.1)`.

    A stepper is a function `(p, lr, **kwargs)` of a parameter, and by keyword of its state and the hypers of its group;
    a dict that it returns updates that state. An attribute `defaults` on it holds default hypers. One that is marked
    by `list_stepper` gets lists of parameters instead. A group is a list of parameters with one dict of hypers, the
    numbers of which stay on the host.
    """

    param_lists: Any  # one list of parameters per group
    hypers: Any  # one dict per group
    frozen_idx: int  # groups before this one are frozen

    def __init__(
        self,
        params: Any,  # parameters, or lists of them: the groups
        cbs: Any,  # a stepper or several, in the order in which they act
        train_bn: bool = True,
        **defaults: Any,  # hypers, as `set_hyper` takes them; TypeError for one that no stepper reads
    ):
        if not train_bn:
            warnings.warn("`train_bn` has no effect here; pass it to the Learner.", stacklevel=2)
        self.cbs = list(L(cbs))
        known = {name: v for cb in self.cbs for name, v in _defaults_of(cb).items()}
        groups = as_groups(params)
        _check_read([*defaults, *(name for group in groups for name in group.hypers)], self.cbs)
        self._begin(groups, {**defaults, **{name: v for name, v in known.items() if name not in defaults}})

    def _begin(self, groups: Sequence[Group], hypers: Mapping[str, Any]) -> None:
        self.param_lists = [list(group) for group in groups]
        self.hypers = [{} for _ in groups]
        self._state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._version = 0  # goes up whenever what is kept between steps may no longer hold
        self._calls = Calls()
        self._required = tuple(hypers)
        self.frozen_idx = 0
        self._note_groups(groups)
        self.set_hypers(**{name: self.or_own(name, value) for name, value in hypers.items()})
        for i, own in enumerate(self._own):
            for name in own.keys() - hypers.keys():
                self._write(i, name, checked(name, own[name]))

    def _note_groups(self, groups: Sequence[Group]) -> None:
        self._own = [group.hypers for group in groups]
        self._titles = [group.title for group in groups]
        self._names = {p: name for group in groups for p, name in zip(group, group.names, strict=False)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs the steppers on every parameter that has a gradient and is not frozen."""
        if closure is not None:
            raise NotImplementedError(
                "this `step` takes no closure; wrap an optimizer of torch that does in OptimWrapper."
            )
        for call in self._calls.of(self):
            for stepper in call.steppers:
                new = stepper(call.params, **{**call.columns, **call.hypers})
                if isinstance(new, dict):
                    call.take(new)

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
        return spread(name, value, len(self.param_lists))

    def or_own(self, name: str, value: Any) -> list[Any]:
        """A value per group, but for a group that was made with one of its own (`by_name`) that."""
        return merged(self._own, name, self.per_group(name, value))

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
        values = [{k: checked(k, host_number(v)) for k, v in group.items() if k != "params"} for group in groups]
        for i, (group, hypers) in enumerate(zip(groups, values, strict=True)):
            for name, value in {**hypers, **{k: v for k, v in group.items() if k == "params"}}.items():
                self._write_group(i, name, value)

    def _write_group(self, i: int, name: str, value: Any) -> None:
        if name != "params":
            self._write(i, name, checked(name, host_number(value)))
        elif value is not self.param_lists[i]:
            self._write_params(i, list(value))

    def _write_params(self, i: int, params: list[Tensor]) -> None:
        self.param_lists[i] = params
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
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"freeze_to({n!r}): pass the number of the first group that is trained.")
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

    def state_dict(self) -> dict[str, Any]:
        """`state` of each parameter in order, `hypers` and `shapes` of each group. Its tensors are the live ones."""
        return {
            "state": [self._saved_state(p) for p in self._parameters()],
            "hypers": [{name: host_number(v) for name, v in hyper.items()} for hyper in self.hypers],
            "shapes": shapes_of(self.param_lists),
        }

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave; ValueError, and nothing changed, where that does not fit."""
        check_fits(sd, self.param_lists, self._required, self._title())
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

    # showing

    def __repr__(self) -> str:
        n = len(self.param_lists)
        shown = [self._group_repr(i) for i in range(min(n, 8))] + ([f"  … {n - 8} more"] if n > 8 else [])
        return "\n".join([f"{self._title()}, {n} parameter group{'s' * (n != 1)}", *shown])

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for hyper in self.hypers for name in hyper))
        rows = [self._cells(i, names) for i in range(len(self.param_lists))]
        return html.table(rows, ("group", "parameters", "tensors", "values", *names, ""), self._title())

    def _cells(self, i: int, names: list[str]) -> list[Any]:
        group, hyper = self.param_lists[i], self.hypers[i]
        numbers = [f"{v:.4g}" if type(v := hyper.get(name, "")) in (int, float) else v for name in names]
        called, values = (self._called(i) or [""]), f"{sum(p.numel() for p in group):,}"
        return [i, *called, len(group), values, *numbers, "frozen" if i < self.frozen_idx else ""]

    def _title(self) -> str:
        return type(self).__name__

    def _group_repr(self, i: int) -> str:
        params, hyper = self.param_lists[i], self.hypers[i]
        numbers = [f"{name}={v:.4g}" for name, v in hyper.items() if type(v) in (int, float)]
        values = sum(p.numel() for p in params)
        frozen = ["frozen"] if i < self.frozen_idx else []
        count = f"{len(params)} tensor{'s' * (len(params) != 1)} with {values:,} values"
        return f"  {i}: " + ", ".join([*self._called(i), count, *numbers, *frozen])

    def _called(self, i: int) -> list[str]:
        """What a group is called: by its pattern, or by the names of its parameters, where they are known."""
        known = [self._names[p] for p in self.param_lists[i] if self._names.get(p)]
        title = (self._titles[i] if i < len(self._titles) else "") or summary_of(known)
        return [title] if title else []


def _defaults_of(stepper: Any) -> dict[str, Any]:
    """A stepper's default hypers; what a partial of it fixes wins over its own."""
    if not isinstance(stepper, functools.partial):
        return getattr(stepper, "defaults", {})
    inner = _defaults_of(stepper.func)
    fixed = {name: v for name, v in stepper.keywords.items() if name in inner}
    return {**inner, **fixed, **getattr(stepper, "defaults", {})}


def _check_read(hypers: Sequence[str], steppers: Sequence[Callable[..., Any]]) -> None:
    """TypeError for a hyper that no stepper reads."""
    read = {*COMMON, *(name for stepper in steppers for name in _defaults_of(stepper))}
    for stepper in steppers:
        try:
            read |= set(inspect.signature(stepper).parameters)
        except ValueError:  # written in C: nobody knows what it reads
            return
    for name in hypers:
        if name not in read:
            near = get_close_matches(name, read, n=1)
            raise TypeError(
                f"no stepper reads the hyper `{name}`; "
                + (f"did you mean `{near[0]}`?" if near else "name it in the signature of the one that does.")
            )


class NothingToTrain(Optimizer):
    """The optimizer of a model without trainable parameters: one empty group with hypers, a step that does nothing."""

    def __init__(self, lr: Any):
        self.cbs = []
        self._begin([Group()], {"lr": lr})
