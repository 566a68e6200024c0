"""Lookahead: slow weights that follow the fast ones of another optimizer."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learnloop.optim.optimizer import Optimizer
from learnloop.optim.saved import copied


class Lookahead(Optimizer):
    """Steps with `opt`; after every `k` steps goes back, to a share `alpha` of the way (arXiv 1907.08610).

    Groups, hypers and state are those of `opt`, and so is every other attribute.
    """

    def __init__(
        self,
        opt: Optimizer,  # any optimizer of this family, OptimWrapper too
        k: int = 6,
        alpha: float = 0.5,
    ):
        if not isinstance(opt, Optimizer):
            raise TypeError(f"Lookahead got {type(opt).__name__}; wrap it first: `Lookahead(OptimWrapper(opt=…))`.")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"`k={k!r}`: pass the number of steps from one look ahead to the next, 1 or more.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha={alpha!r}`: pass the share of the way, from 0 to 1.")
        self.opt, self.k, self.alpha = opt, k, alpha
        self._forget()

    def _forget(self) -> None:
        self.count = 0  # steps since the first
        self._slow: dict[Tensor, Tensor] = {}  # where the fast weights were when the present `k` steps began

    def __getattr__(self, name: str) -> Any:
        if name == "opt":  # not yet there while a copy is being made
            raise AttributeError(name)
        return getattr(self.opt, name)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of `opt`, and after every `k` of them the way back; frozen parameters stay where they are."""
        trained = [p for group in self.opt.param_lists for p in group if p.requires_grad]
        if self.count % self.k == 0:
            self._slow = {p: p.detach().clone() for p in trained}
        found = self.opt.step() if closure is None else self.opt.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            fast = [p for p in trained if p in self._slow]
            slow = [self._slow[p] for p in fast]
            torch._foreach_lerp_(slow, fast, self.alpha)
            torch._foreach_copy_(fast, slow)
        return found

    def clear_state(self) -> None:
        """Forgets what the steps of `opt` have gathered, and the slow weights."""
        self.opt.clear_state()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """What `opt` saves, with `count` and `slow_weights`, one per parameter or None."""
        slow = [self._slow.get(p) for p in self._parameters()]
        return {**self.opt.state_dict(), "count": self.count, "slow_weights": slow}

    def load_state_dict(self, sd: Mapping[str, Any]) -> None:
        """Takes a copy of what `state_dict` gave; ValueError, and nothing changed, where that does not fit."""
        if not {"count", "slow_weights"} <= set(sd):
            raise ValueError("the state has no `count` and `slow_weights`; it is not one of Lookahead.")
        self.opt.load_state_dict({name: v for name, v in sd.items() if name not in ("count", "slow_weights")})
        pairs = zip(self._parameters(), sd["slow_weights"], strict=True)
        self.count, self._slow = sd["count"], {p: copied(slow, p.device) for p, slow in pairs if slow is not None}

    def _title(self) -> str:
        return f"Lookahead(k={self.k}, alpha={self.alpha:g}) of {self.opt._title()}"

    # what the wrapped optimizer has

    @property
    def param_lists(self) -> Any:
        """Those of `opt`."""
        return self.opt.param_lists

    @param_lists.setter
    def param_lists(self, lists: Any) -> None:
        self.opt.param_lists = lists

    @property
    def hypers(self) -> Any:
        """Those of `opt`."""
        return self.opt.hypers

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """That of `opt`."""
        return self.opt.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of `opt`."""
        return self.opt.param_groups

    @param_groups.setter
    def param_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.opt.param_groups = groups

    @property
    def frozen_idx(self) -> int:
        """That of `opt`."""
        return self.opt.frozen_idx

    @frozen_idx.setter
    def frozen_idx(self, n: int) -> None:
        self.opt.frozen_idx = n

    def set_hyper(self, name: str, value: Any) -> None:
        """Sets a hyper of `opt`."""
        self.opt.set_hyper(name, value)

    def set_hypers(self, **hypers: Any) -> None:
        """Sets several hypers of `opt`: all of them, or none if one is wrong."""
        self.opt.set_hypers(**hypers)

    def last_group(self) -> Mapping[str, Any]:
        """That of `opt`."""
        return self.opt.last_group()

    def freeze_to(self, n: int) -> None:
        """Freezes the groups before `n` of `opt`."""
        self.opt.freeze_to(n)
