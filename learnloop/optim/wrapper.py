"""Optimizers of torch and of other packages, one or several, behind the face of those here."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor

from learnloop.optim.calls import FLAGS
from learnloop.optim.groups import Group, as_groups, listed, sorted_by_pattern
from learnloop.optim.hypers import LinkedDict, checked, host_number, spread
from learnloop.optim.optimizer import Optimizer
from learnloop.optim.saved import copied

#: torch's name of a hyper -> the name here; a number behind `__` is a place in a tuple.
pytorch_hp_map = {"momentum": "mom", "weight_decay": "wd", "alpha": "sqr_mom", "betas__0": "mom", "betas__1": "sqr_mom"}


class OptimWrapper(Optimizer):
    """Gives an optimizer of torch the face of those here: `OptimWrapper(params, opt=torch.optim.AdamW, lr=0.1)`.

    Several optimizers work as one: `opt=[SGD, AdamW]` takes one for each parameter group, and
    `opt={"head.*": SGD, "*": AdamW}` makes the groups by the parameters' names. Hypers live in torch's groups and are
    shown under the names here. `state` holds the flags; what the steps gather is in torch's optimizers. Other
    attributes are those of torch's optimizer, which is `opt`, or the tuple `opt` where there are several.
    """

    def __init__(
        self,
        params: Any = None,  # as for any optimizer here, or `named_parameters()`; None with a built `opt`
        opt: Any = None,  # what makes an optimizer of torch, a list or dict of that, or a built one
        hp_map: Mapping[str, str] | None = None,  # torch's names -> names here; default: `pytorch_hp_map`
        convert_groups: bool = True,  # False hands `params` to `opt` as they are
        **kwargs: Any,  # for `opt`, or for each of several, in torch's names; `lr` as `set_hyper` takes it
    ):
        rates = kwargs.get("lr")
        if isinstance(rates, (slice, list, tuple)):
            kwargs["lr"] = 0.0  # set below: torch takes one number for all groups
        groups, self.optimizers = _made(params, opt, convert_groups, kwargs)
        hp_map = pytorch_hp_map if hp_map is None else hp_map
        flat = [name for _, group in self._groups() for name in _flat(group)]
        self.fwd_map = {name: hp_map.get(name, name) for name in flat}
        self.bwd_map = {ours: theirs for theirs, ours in self.fwd_map.items()}
        self._state = defaultdict(dict)
        self._version = 0
        self._decay_asked = _asks_for_decay(opt, kwargs)
        self.frozen_idx = 0
        self._note_groups(groups)
        self._refresh()
        names = dict.fromkeys(("lr", *hp_map.values()))
        self._required = tuple(name for name in names if all(name in known for known in self._maps))
        self._set_own()
        if kwargs.get("lr") is not rates:
            self.set_hyper("lr", self.or_own("lr", rates))

    @property
    def opt(self) -> Any:
        """torch's optimizer; a tuple where there are several."""
        return self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers

    def _groups(self) -> list[tuple[Any, dict[str, Any]]]:
        """Each of torch's groups, after the optimizer that it belongs to."""
        return [(opt, group) for opt in self.optimizers for group in opt.param_groups]

    def _set_own(self) -> None:
        for i, own in enumerate(self._own):
            for name, value in own.items():
                if name not in self._maps[i]:
                    raise TypeError(f"group {i} has no hyper `{name}`, but {', '.join(self._maps[i])}.")
                self._write(i, name, checked(name, value))
                self._decay_asked |= name == "wd"

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name not in ("_seen", "_hypers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._refresh()  # a copy's hypers write into the copy

    def __getattr__(self, name: str) -> Any:
        if name == "optimizers":  # not yet there while a copy is being made
            raise AttributeError(name)
        return getattr(self.opt, name)

    @property
    def param_lists(self) -> list[list[Tensor]]:
        """torch's own lists of parameters."""
        return [group["params"] for _, group in self._groups()]

    @param_lists.setter
    def param_lists(self, lists: Sequence[Iterable[Tensor]]) -> None:
        for (_, group), params in zip(self._groups(), lists, strict=True):
            group["params"] = list(params)

    @property
    def hypers(self) -> list[LinkedDict]:
        """torch's hypers under the names here; what is written into them is set in torch's groups."""
        if self._changed():
            self._refresh()
        return self._hypers

    def last_group(self) -> Mapping[str, Any]:
        """The live dict in which the last group's `lr` stands: torch's own."""
        return self.optimizers[-1].param_groups[-1]

    def _changed(self) -> bool:
        # By identity: read in every batch, and `==` between lists of parameters would compare tensors.
        groups = self._groups()
        for (_, group), seen in zip(groups, self._seen, strict=False):
            if len(group) != len(seen) or not all(map(is_, group.values(), seen.values())):
                return True
        return len(groups) != len(self._seen)

    def _refresh(self) -> None:
        self._seen: list[dict[str, Any]] = [dict(group) for _, group in self._groups()]
        flat = [_flat(group) for group in self._seen]
        self._maps: list[dict[str, str]] = [
            {self.fwd_map.get(theirs, theirs): theirs for theirs in names} for names in flat
        ]
        self._hypers = [
            LinkedDict(partial(self._write_group, i), {self.fwd_map.get(k, k): v for k, v in names.items()})
            for i, names in enumerate(flat)
        ]

    def set_hypers(self, **hypers: Any) -> None:
        """Sets several hypers: all of them, or none if one is wrong."""
        super().set_hypers(**hypers)
        self._decay_asked |= "wd" in hypers

    def set_hyper(self, name: str, value: Any) -> None:
        """Sets a hyper in every group; see `Optimizer.set_hyper`."""
        faces, groups = self.hypers, self._groups()  # looked at once: schedules come here in every batch
        for i, v in enumerate(spread(name, value, len(groups))):
            self._write_in(faces[i], groups[i][1], i, name, v)
        self._decay_asked |= name == "wd"

    def state_dict(self) -> dict[str, Any]:
        """`state` and `hypers` as of any optimizer here, and whether somebody asked for the weight decay."""
        return {**super().state_dict(), "decay_asked": self._decay_asked}

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave; ValueError, and nothing changed, where that does not fit."""
        super().load_state_dict(sd)
        self._decay_asked = sd.get("decay_asked", self._decay_asked)

    def _write(self, i: int, name: str, value: Any) -> None:
        self._write_in(self.hypers[i], self._groups()[i][1], i, name, value)

    def _write_in(self, face: LinkedDict, group: dict[str, Any], i: int, name: str, value: Any) -> None:
        key, _, place = self._maps[i].get(name, name).partition("__")
        old: Any = group.get(key)
        new = tuple(value if j == int(place) else v for j, v in enumerate(old)) if place else value
        if isinstance(old, Tensor):
            old.fill_(value)  # `capturable` needs the very tensor that was captured
        else:
            group[key] = new
        # Only this item is noted: reading all groups anew costs microseconds, and schedules write every batch.
        self._seen[i][key] = group[key]
        self._maps[i].setdefault(name, name)
        dict.__setitem__(face, name, value)

    def _write_params(self, i: int, params: list[Tensor]) -> None:
        self._groups()[i][1]["params"] = params

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """torch's step; parameters with the flag `do_wd=False` take part in it without weight decay."""
        if closure is None and not self._decay_asked and len(self.optimizers) == 1:
            return self.optimizers[0].step()  # the plain case, without the calls below
        if closure is not None and len(self.optimizers) > 1:
            raise NotImplementedError("several optimizers take no closure: each would call it.")
        exempt = self._exempt() if self._decay_asked else {}
        if not exempt:
            return self._step(closure)
        with self._split(exempt):
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is not None:
            return self.opt.step(closure)
        for opt in self.optimizers:
            found = opt.step()
        return found

    def _exempt(self) -> dict[int, list[Tensor]]:
        """By group the parameters that its weight decay leaves alone. torch's own default acts as torch has it."""
        found = {}
        for i, (_, group) in enumerate(self._groups()):
            if group.get(self._maps[i].get("wd", "")):
                params = [p for p in group["params"] if not self._state[p].get("do_wd", True)]
                found.update({i: params} if params else {})
        return found

    @contextmanager
    def _split(self, exempt: dict[int, list[Tensor]]) -> Iterator[None]:
        # Only during a step: outside, torch's optimizer keeps the groups that its schedulers and files know.
        groups = self._groups()
        lists = [(opt, opt.param_groups) for opt in self.optimizers]
        whole = [(groups[i][1], dict(groups[i][1])) for i in exempt]
        try:
            for i, without in exempt.items():
                opt, group = groups[i]
                wd, alone = self._maps[i]["wd"], {id(p) for p in without}
                decayed = [p for p in group["params"] if id(p) not in alone]
                if not decayed:
                    group[wd] = 0.0  # not a group beside it: some optimizers count their steps in the group
                    continue
                group["params"] = decayed
                opt.param_groups = [*opt.param_groups, {**group, "params": without, wd: 0.0}]
            yield
        finally:
            for opt, former in lists:
                opt.param_groups = former
            for i, (group, before) in zip(exempt, whole, strict=True):
                wd = self._maps[i]["wd"]
                group["params"], group[wd] = before["params"], before[wd]

    def zero_grad(self) -> None:
        """Sets every gradient to None."""
        for opt in self.optimizers:
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = None

    def clear_state(self) -> None:
        """Forgets what torch's steps have gathered; keeps the flags."""
        for opt in self.optimizers:
            opt.state = defaultdict(dict)

    def _saved_state(self, p: Tensor) -> dict[str, Any]:
        gathered = [opt.state[p] for opt in self.optimizers if p in opt.state]
        return {**self._state[p], **(gathered[0] if gathered else {})}

    def _put_state(self, p: Tensor, i: int, state: Mapping[str, Any]) -> None:
        self._state[p] = {name: v for name, v in state.items() if name in FLAGS}
        gathered = {name: v for name, v in state.items() if name not in FLAGS}
        opt, group = self._groups()[i]
        opt.state.pop(p, None)
        if gathered:
            opt.state[p] = copied(gathered, p.device)
            _place_step(opt.state[p], group)

    def _put_hypers(self, i: int, hyper: Mapping[str, Any]) -> None:
        for name, value in hyper.items():
            self._write(i, name, host_number(value))

    def _title(self) -> str:
        return f"OptimWrapper of {' and '.join(type(opt).__name__ for opt in self.optimizers)}"


def _place_step(state: dict[str, Any], group: Mapping[str, Any]) -> None:
    # torch counts steps on the host unless its fused or capturable form runs.
    step = state.get("step")
    if isinstance(step, Tensor) and not (group.get("fused") or group.get("capturable")):
        state["step"] = step.cpu()


def _asks_for_decay(opt: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether somebody set a weight decay, rather than the optimizer's own default."""
    makers = list(opt.values()) if isinstance(opt, Mapping) else opt if isinstance(opt, (list, tuple)) else [opt]
    return any(not callable(m) or "weight_decay" in {**kwargs, **getattr(m, "keywords", {})} for m in makers)


# Making torch's optimizers


def _made(params: Any, opt: Any, convert_groups: bool, kwargs: dict[str, Any]) -> tuple[list[Group], tuple[Any, ...]]:
    """The groups as they are called here, and the optimizers."""
    if isinstance(opt, (list, tuple, Mapping)):
        return _several(params, opt, kwargs)
    groups, made = _one(params, opt, convert_groups, kwargs)
    missing = [name for name in ("param_groups", "state", "step") if not hasattr(made, name)]
    if missing:
        raise TypeError(f"`opt` gave a {type(made).__name__} without {', '.join(missing)}: no optimizer like torch's.")
    return groups, (made,)


def _one(params: Any, opt: Any, convert_groups: bool, kwargs: dict[str, Any]) -> tuple[list[Group], Any]:
    if opt is None:
        raise ValueError("OptimWrapper needs `opt`: a torch optimizer class such as torch.optim.AdamW, or a built one.")
    if not callable(opt):
        if params is not None or kwargs:
            raise ValueError(
                "OptimWrapper got a built `opt` together with what only its class could take; pass it alone."
            )
        return [], opt
    if params is None:
        raise ValueError(f"OptimWrapper needs `params` to build {getattr(opt, '__name__', opt)}.")
    if not convert_groups:
        return [], opt(params, **kwargs)
    items = params if isinstance(params, Group) else listed(params)
    if any(isinstance(item, Mapping) for item in items):
        return [], opt([item if isinstance(item, Mapping) else {"params": list(item)} for item in items], **kwargs)
    groups = as_groups(items)
    return groups, opt([{"params": list(group)} for group in groups], **kwargs)


def _several(params: Any, makers: Any, kwargs: dict[str, Any]) -> tuple[list[Group], tuple[Any, ...]]:
    if params is None:
        raise ValueError("OptimWrapper needs `params` to build several optimizers.")
    groups = as_groups(params)
    if isinstance(makers, Mapping):
        groups, makers = _by_pattern(groups, list(makers)), list(makers.values())
    if len(makers) != len(groups):
        raise ValueError(
            f"`opt` names {len(makers)} optimizers, but there are {len(groups)} parameter groups; "
            "pass one for each, or a dict from name pattern to optimizer."
        )
    pairs = zip(makers, groups, strict=True)
    return groups, tuple(make([{"params": list(group)}], **kwargs) for make, group in pairs)


def _by_pattern(groups: list[Group], patterns: list[str]) -> list[Group]:
    if len(groups) > 1:
        raise ValueError(
            f"the patterns of `opt` make the parameter groups, but the splitter has made {len(groups)} already; "
            "leave the splitter away, or pass `opt` as a list."
        )
    (group,) = groups
    if len(group.names) != len(group) or not all(group.names):
        raise ValueError("patterns need names: pass `model.named_parameters()`, or let a Learner make the optimizer.")
    named = dict(zip(group.names, group, strict=True))
    chosen = sorted_by_pattern(group.names, patterns)
    return [Group([named[n] for n in names], names, pattern) for pattern, names in chosen.items()]


def _flat(group: Mapping[str, Any]) -> dict[str, Any]:
    """A torch group's hypers, tuples taken apart: `betas` as `betas__0` and `betas__1`."""
    flat: dict[str, Any] = {}
    for name, value in group.items():
        if name in ("params", "param_names"):
            continue
        parts = {f"{name}__{i}": v for i, v in enumerate(value)} if isinstance(value, (tuple, list)) else {name: value}
        flat.update({part: host_number(v) for part, v in parts.items()})
    return flat
