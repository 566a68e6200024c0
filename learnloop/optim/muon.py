"""Muon for the weights inside a network, AdamW for the rest, as one optimizer."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from learnloop.optim.fused import fused_adam
from learnloop.optim.groups import Group, as_groups, summary_of
from learnloop.optim.optimizer import Optimizer
from learnloop.optim.steppers import grads_of, list_stepper

_COEFFICIENTS, _EPS = (3.4445, -4.7750, 2.0315), 1e-7  # torch's own defaults


@list_stepper(wd=0.0)
def muon_step(
    ps: list[Tensor],
    lr: float,
    mom: float,
    wd: float,
    do_wd: bool = True,
    grad_avg: list[Tensor] | None = None,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: str = "match_rms_adamw",
    **kwargs: Any,
) -> dict[str, Any]:
    """torch's Muon on matrices: decay, average, and a step along the average with its singular values made equal."""
    grad_avg = [torch.zeros_like(p) for p in ps] if grad_avg is None else grad_avg
    _torch_muon()(
        ps,
        grads_of(ps),
        grad_avg,
        lr=lr,
        weight_decay=wd if do_wd else 0.0,
        momentum=mom,
        nesterov=nesterov,
        ns_coefficients=_COEFFICIENTS,
        ns_steps=ns_steps,
        eps=_EPS,
        adjust_lr_fn=adjust_lr,
        has_complex=False,
    )
    return {"grad_avg": grad_avg}


@list_stepper(eps=1e-5, wd=0.0)
def muon_or_adam(
    ps: list[Tensor], sqr_mom: float, eps: float, is_hidden: bool = False, **kwargs: Any
) -> dict[str, Any]:
    """`muon_step` for parameters with the flag `is_hidden`, `fused_adam` for the others."""
    return muon_step(ps, **kwargs) if is_hidden else fused_adam(ps, sqr_mom=sqr_mom, eps=eps, **kwargs)


class Muon(Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) for hidden weights, AdamW for all else, under the same hypers.

    Hidden are the matrices, but for those of embeddings and the last one, which is taken for the output layer; or what
    `hidden` names. Prints who got what; ValueError where nothing is hidden. With `adjust_lr="match_rms_adamw"` the
    rate and decay that suit AdamW suit Muon (arXiv 2502.16982); `"original"` wants a rate of about 0.02 for it.
    """

    def __init__(
        self,
        params: Any,
        lr: Any,
        mom: Any = 0.95,
        sqr_mom: Any = 0.99,  # of AdamW, as eps
        eps: Any = 1e-5,
        wd: Any = 0.01,
        hidden: str | Sequence[str] | None = None,  # patterns of names, as for `by_name`; a Learner hands names on
        adjust_lr: str = "match_rms_adamw",
        nesterov: bool = True,
        ns_steps: int = 5,  # of the iteration that equals the singular values
    ):
        _torch_muon()
        groups = as_groups(params)
        found = _hidden(groups, hidden)
        stepper = partial(muon_or_adam, adjust_lr=adjust_lr, nesterov=nesterov, ns_steps=ns_steps)
        super().__init__(groups, stepper, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)
        for p in self._parameters():
            self.state[p]["is_hidden"] = p in found
        print(self._split())

    def _split(self) -> str:
        hidden = [p for p in self._parameters() if self._state[p]["is_hidden"]]
        rest = [p for p in self._parameters() if not self._state[p]["is_hidden"]]
        return f"Muon steps {self._said(hidden)}; AdamW {self._said(rest)}"

    def _said(self, params: list[Tensor]) -> str:
        names = [self._names[p] for p in params if self._names.get(p)]
        count = f"{len(params)} tensor{'s' * (len(params) != 1)} with {sum(p.numel() for p in params):,} values"
        return count + (f" ({', '.join(names) if len(names) < 5 else summary_of(names)})" if names else "")


def _hidden(groups: Sequence[Group], patterns: str | Sequence[str] | None) -> set[Tensor]:
    chosen = _by_rule(groups) if patterns is None else _by_pattern(groups, patterns)
    if not chosen:
        wanted = "two-dimensional weights between input and output" if patterns is None else f"names like {patterns!r}"
        raise ValueError(f"there is nothing for Muon: no {wanted} among the parameters. Take `Adam`.")
    for p in chosen:
        if p.ndim != 2:
            raise ValueError(f"`hidden` names a parameter of shape {tuple(p.shape)}; Muon steps matrices only.")
    return chosen


def _by_rule(groups: Sequence[Group]) -> set[Tensor]:
    matrices = []
    for group in groups:
        layers = group.layers or [None] * len(group)
        of_embedding = (nn.Embedding, nn.EmbeddingBag)
        matrices += [p for p, m in zip(group, layers, strict=True) if p.ndim == 2 and not isinstance(m, of_embedding)]
    return set(matrices[:-1])


def _by_pattern(groups: Sequence[Group], patterns: str | Sequence[str]) -> set[Tensor]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not all(len(group.names) == len(group) for group in groups):
        raise ValueError("`hidden` needs names: pass `model.named_parameters()`, or let a Learner make the optimizer.")
    named = [pair for group in groups for pair in zip(group.names, group, strict=True)]
    return {p for name, p in named if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _torch_muon() -> Callable[..., None]:
    try:
        from torch.optim._muon import muon
    except ImportError:
        raise ImportError(f"Muon is in torch from 2.9 on; this is torch {torch.__version__}.") from None
    return muon
