"""Which parameters form a group: splitters, and the parameters that weight decay or freezing leaves alone."""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fastcore.foundation import L
from torch import nn

from learnloop.optim.optimizer import OptimizerFace

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
#: How those are called that models bring along: LlamaRMSNorm, T5LayerNorm, RMSNormGated; no NormalizedLinear.
NORM_NAME = re.compile("Norm(?![a-z])")


def params(model: Any) -> L:
    """All parameters of a model."""
    return L(model.parameters() if isinstance(model, nn.Module) else ())


def trainable_params(model: Any) -> L:
    """The parameters of a model that require a gradient: the splitter that makes one group."""
    return L(p for p in params(model) if p.requires_grad)


def norm_bias_params(model: nn.Module, with_bias: bool = True) -> L:
    """The parameters of normalization layers, and every bias unless `with_bias=False`.

    Such layers are torch's, and those with a class name like `LlamaRMSNorm`, of which the vectors count.
    """
    found: dict[int, Any] = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        found |= {id(p): p for p in _norm_params(module)}
        if with_bias and isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            found[id(bias)] = bias
    return L(found.values())


def _norm_params(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's own parameters if it normalizes."""
    if isinstance(module, NORMS):
        yield from module.parameters(recurse=False)
    elif NORM_NAME.search(type(module).__name__):
        yield from (p for p in module.parameters(recurse=False) if p.ndim == 1)


class NothingToTrain(OptimizerFace):
    """The optimizer of a model without trainable parameters: one empty group with hypers, a step that does nothing."""

    def __init__(self, lr: Any):
        self.param_lists, self.hypers = L([L()]), L([{}])
        self._state, self._version, self._required, self.frozen_idx = defaultdict(dict), 0, (), 0
        self.set_hypers(lr=lr)

    def step(self, closure: Any = None) -> None:
        """There is nothing to update."""
