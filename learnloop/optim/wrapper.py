"""Optimizers of torch and of other packages behind the face of those here."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor

from learnloop.optim.optimizer import FLAGS, LinkedDict, OptimizerFace, as_groups, copied, host_number, listed

#: torch's name of a hyper -> the name here; a number behind `__` is a place in a tuple.
pytorch_hp_map = {"momentum": "mom", "weight_decay": "wd", "alpha": "sqr_mom", "betas__0": "mom", "betas__1": "sqr_mom"}


class OptimWrapper(OptimizerFace):
    """Gives an optimizer of torch the face of those here: `OptimWrapper(params, opt=torch.optim.AdamW, lr=0.1)`.

    Hypers live in torch's groups and are shown under the names here. `state` holds the flags; what the steps gather
    is in `opt.state`. Other attributes are those of torch's optimizer, which is `opt`.
    """

    def __init__(
        self,
        params: Any = None,  # as for any optimizer here; None with a built `opt`
        opt: Any = None,  # a class or function that makes a torch optimizer, or a built one
        hp_map: Mapping[str, str] | None = None,  # torch's names -> names here; default: `pytorch_hp_map`
        convert_groups: bool = True,  # False hands `params` to `opt` as they are
        **kwargs: Any,  # for `opt`, in torch's names
    ):
        self.opt = _torch_optimizer(params, opt, convert_groups, kwargs)
        hp_map = pytorch_hp_map if hp_map is None else hp_map
        self.fwd_map = {name: hp_map.get(name, name) for group in self.opt.param_groups for name in _flat(group)}
        self.bwd_map = {ours: theirs for theirs, ours in self.fwd_map.items()}
        self._state = defaultdict(dict)
        self._version = 0
        self._decay_asked = not callable(opt) or "weight_decay" in {**kwargs, **getattr(opt, "keywords", {})}
        self._required = tuple(name for name in ("lr", *hp_map.values()) if name in self.bwd_map)
        self.frozen_idx = 0
        self._refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {name: v for name, v in vars(self).items() if name not in ("_seen", "_hypers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._refresh()  # a copy's hypers write into the copy

    def __getattr__(self, name: str) -> Any:
        if name == "opt":  # not yet there while a copy is being made
            raise AttributeError(name)
        return getattr(self.opt, name)

    @property
    def param_lists(self) -> list[list[Tensor]]:
        """torch's own lists of parameters."""
        return [group["params"] for group in self.opt.param_groups]

    @param_lists.setter
    def param_lists(self, lists: Sequence[Iterable[Tensor]]) -> None:
        for group, params in zip(self.opt.param_groups, lists, strict=True):
            group["params"] = list(params)

    @property
    def hypers(self) -> list[LinkedDict]:
        """torch's hypers under the names here; what is written into them is set in torch's groups."""
        if self._changed():
            self._refresh()
        return self._hypers

    def last_group(self) -> Mapping[str, Any]:
        """The live dict in which the last group's `lr` stands: torch's own."""
        return self.opt.param_groups[-1]

    def _changed(self) -> bool:
        # By identity: read in every batch, and `==` between lists of parameters would compare tensors.
        for group, seen in zip(self.opt.param_groups, self._seen, strict=False):
            if len(group) != len(seen) or not all(map(is_, group.values(), seen.values())):
                return True
        return len(self.opt.param_groups) != len(self._seen)

    def _refresh(self) -> None:
        self._seen = [dict(group) for group in self.opt.param_groups]
        self._hypers = [
            LinkedDict(partial(self._write_group, i), {self.fwd_map.get(k, k): v for k, v in _flat(group).items()})
            for i, group in enumerate(self._seen)
        ]

    def set_hypers(self, **hypers: Any) -> None:
        """Sets several hypers: all of them, or none if one is wrong."""
        super().set_hypers(**hypers)
        self._decay_asked |= "wd" in hypers

    def set_hyper(self, name: str, value: Any) -> None:
        """Sets a hyper in every group; see `OptimizerFace.set_hyper`."""
        super().set_hyper(name, value)
        self._decay_asked |= name == "wd"

    def state_dict(self) -> dict[str, Any]:
        """`state` and `hypers` as of any optimizer here, and whether somebody asked for the weight decay."""
        return {**super().state_dict(), "decay_asked": self._decay_asked}

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave; ValueError, and nothing changed, where that does not fit."""
        super().load_state_dict(sd)
        self._decay_asked = sd.get("decay_asked", self._decay_asked)

    def _write(self, i: int, name: str, value: Any) -> None:
        face, group = self.hypers[i], self.opt.param_groups[i]
        key, _, place = self.bwd_map.get(name, name).partition("__")
        old = group.get(key)
        new = tuple(value if j == int(place) else v for j, v in enumerate(old)) if place else value
        if isinstance(old, Tensor):
            old.fill_(value)  # `capturable` needs the very tensor that was captured
        else:
            group[key] = new
        # Only this item is noted: reading all groups anew costs microseconds, and schedules write every batch.
        self._seen[i][key] = group[key]
        dict.__setitem__(face, name, value)

    def _write_params(self, i: int, params: list[Tensor]) -> None:
        self.opt.param_groups[i]["params"] = params

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """torch's step; parameters with the flag `do_wd=False` take part in it without weight decay."""
        if not self._decay_asked and closure is None:
            return self.opt.step()
        exempt = self._exempt()
        if not exempt:
            return self.opt.step() if closure is None else self.opt.step(closure)
        with self._split(exempt):
            return self.opt.step() if closure is None else self.opt.step(closure)

    def _exempt(self) -> dict[int, list[Tensor]]:
        if not self._decay_asked:  # torch's own default: nobody asked for it, so it acts as torch has it
            return {}
        key = self.bwd_map.get("wd")
        decayed = [(i, group["params"]) for i, group in enumerate(self.opt.param_groups) if key and group.get(key)]
        found = {i: [p for p in params if not self._state[p].get("do_wd", True)] for i, params in decayed}
        return {i: params for i, params in found.items() if params}

    @contextmanager
    def _split(self, exempt: dict[int, list[Tensor]]) -> Iterator[None]:
        # Only during a step: outside, torch's optimizer keeps the groups that its schedulers and files know.
        groups, opt = self.opt.param_groups, self.opt
        whole = {i: groups[i]["params"] for i in exempt}
        key = self.bwd_map["wd"]
        try:
            for i, params in exempt.items():
                groups[i]["params"] = [p for p in whole[i] if self._state[p].get("do_wd", True)]
                opt.param_groups = [*opt.param_groups, {**groups[i], "params": params, key: 0.0}]
            opt.param_groups = [group for group in opt.param_groups if group["params"]]
            yield
        finally:
            opt.param_groups = groups
            for i, params in whole.items():
                groups[i]["params"] = params

    def zero_grad(self) -> None:
        """Sets every gradient to None."""
        for group in self.opt.param_groups:
            for p in group["params"]:
                p.grad = None

    def clear_state(self) -> None:
        """Forgets what torch's steps have gathered; keeps the flags `do_wd` and `force_train`."""
        self.opt.state = defaultdict(dict)

    def _saved_state(self, p: Tensor) -> dict[str, Any]:
        return {**self._state[p], **self.opt.state.get(p, {})}

    def _put_state(self, p: Tensor, i: int, state: Mapping[str, Any]) -> None:
        self._state[p] = {name: v for name, v in state.items() if name in FLAGS}
        gathered = {name: v for name, v in state.items() if name not in FLAGS}
        self.opt.state.pop(p, None)
        if gathered:
            self.opt.state[p] = copied(gathered, p.device)
            self._place_step(p, self.opt.param_groups[i])

    def _place_step(self, p: Tensor, group: Mapping[str, Any]) -> None:
        # torch counts steps on the host unless its fused or capturable form runs.
        step = self.opt.state[p].get("step")
        if isinstance(step, Tensor) and not (group.get("fused") or group.get("capturable")):
            self.opt.state[p]["step"] = step.cpu()

    def _put_hypers(self, i: int, hyper: Mapping[str, Any]) -> None:
        for name, value in hyper.items():
            self._write(i, name, host_number(value))

    def _title(self) -> str:
        return f"OptimWrapper of {type(self.opt).__name__}"


def _torch_optimizer(params: Any, opt: Any, convert_groups: bool, kwargs: dict[str, Any]) -> Any:
    if opt is None:
        raise ValueError("OptimWrapper needs `opt`: a torch optimizer class such as torch.optim.AdamW, or a built one.")
    if not callable(opt):
        if params is not None or kwargs:
            raise ValueError(
                "OptimWrapper got a built `opt` together with what only its class could take; pass it alone."
            )
        return opt
    if params is None:
        raise ValueError(f"OptimWrapper needs `params` to build {getattr(opt, '__name__', opt)}.")
    return opt(_torch_groups(params) if convert_groups else params, **kwargs)


def _torch_groups(params: Any) -> list[Any]:
    items = listed(params)
    if any(isinstance(item, Mapping) for item in items):
        return [item if isinstance(item, Mapping) else {"params": list(item)} for item in items]
    return [{"params": group} for group in as_groups(items)]


def _flat(group: Mapping[str, Any]) -> dict[str, Any]:
    """A torch group's hypers, tuples taken apart: `betas` as `betas__0` and `betas__1`."""
    flat: dict[str, Any] = {}
    for name, value in group.items():
        if name in ("params", "param_names"):
            continue
        parts = {f"{name}__{i}": v for i, v in enumerate(value)} if isinstance(value, (tuple, list)) else {name: value}
        flat.update({part: host_number(v) for part, v in parts.items()})
    return flat
