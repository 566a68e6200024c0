"""Dropout outside of training."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from learnloop.callbacks.modes import TrainEvalCallback
from learnloop.data.keyed import draw_seed, random_states, set_random_states
from learnloop.loop.callback import Callback


class MCDropoutCallback(Callback):
    """Leaves dropout on in validation and prediction: predictions of several runs differ by what the model doubts.

    Layers with `dropout` in their class name are in train mode from `before_validate` to `cleanup_validate`. Each such
    phase draws one seed from the global stream, also where a run otherwise leaves that as it was, so that two calls
    differ. Source: Gal and Ghahramani, arXiv 1506.02142; docs.fast.ai/callback.preds. Cost per batch: none.
    """

    run_after = TrainEvalCallback

    def __init__(self) -> None:
        self._before: list[tuple[Any, dict[nn.Module, bool]]] = []  # random states and modes, outermost run first

    def before_validate(self) -> None:
        learn = self.learn
        seed = draw_seed()
        if learn.task != "fit":
            learn._seeds_drawn += 1  # the run puts the stream back that it has drawn from
        modes = {layer: layer.training for layer in _dropouts(learn.model)}
        self._before.append((random_states(), modes))
        for layer in modes:
            layer.training = True
        torch.manual_seed(seed)

    def cleanup_validate(self) -> None:
        if self._before:
            states, modes = self._before.pop()
            set_random_states(states)
            for layer, training in modes.items():
                layer.training = training


def _dropouts(model: Any) -> Iterator[nn.Module]:
    """Every layer of dropout, and what is inside one."""
    for m in model.modules() if isinstance(model, nn.Module) else ():
        if "dropout" in type(m).__name__.lower():
            yield from m.modules()
