"""One of each callback of the library, and a small learner on which it has something to do."""

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from fastcore.basics import noop
from torch import Tensor, nn

import learnloop as ll
from learnloop.data.keyed import preserved_randomness

N_TRAIN, BS = 8, 4

#: How to make those that cannot be made without arguments, or would do nothing then.
MAKERS: dict[str, Callable[[], ll.Callback]] = {
    "BatchTransform": lambda: ll.BatchTransform(ll.transforms.flip),
    "FreezeUntil": lambda: ll.FreezeUntil(1),
    "GradientAccumulation": lambda: ll.GradientAccumulation(N_TRAIN),
    "GradientClip": lambda: ll.GradientClip(0.01),
    "MixedPrecision": lambda: ll.MixedPrecision("bf16"),
    "ParamScheduler": lambda: ll.ParamScheduler({"lr": ll.SchedCos(0.1, 0.01)}),
    "ProgressiveResize": lambda: ll.ProgressiveResize(multiple=2),
    "RNNRegularizer": lambda: ll.RNNRegularizer(2.0, 1.0),
    "SWA": lambda: ll.SWA(0),
    "SkipToEpoch": lambda: ll.SkipToEpoch(1),
    "WeightedSampling": lambda: ll.WeightedSampling([1.0, 2.0] * (N_TRAIN // 2)),
}
#: Integrations: class -> module, what its package is called, and how one is made that sends nothing anywhere.
INTEGRATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "MLflowCallback": ("mlflow", "mlflow", {"every": 1}),
    "TensorBoardCallback": ("tensorboard", "tensorboard", {"every": 1, "trace_model": False}),
    "TrackioCallback": ("trackio", "trackio", {"project": "toy", "every": 1, "auto_log_cpu": False}),
    "WandbCallback": ("wandb", "wandb", {"mode": "offline", "every": 1}),
}
RECURRENT = ("ModelResetter", "RNNCallback", "RNNRegularizer")


def callbacks() -> dict[str, type[ll.Callback]]:
    """Every public callback by name, without the integrations."""
    found = {name: getattr(ll, name) for name in ll.__all__}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, ll.Callback)}


def made(name: str) -> ll.Callback:
    """One of that class."""
    if name in INTEGRATIONS:
        module, _, options = INTEGRATIONS[name]
        return getattr(importlib.import_module(f"learnloop.integrations.{module}"), name)(**options)
    return MAKERS.get(name, getattr(ll, name))()


class Network(nn.Module):
    """Three classes of small images, with what callbacks look for: batch norm, dropout, and a state that it carries."""

    def __init__(self, is_recurrent: bool):
        super().__init__()
        pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten()  # some callbacks make images smaller; convolutions take long
        self.body = nn.Sequential(*pooled, nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.25), nn.Linear(4, 3))
        self.is_recurrent, self.hidden = is_recurrent, torch.zeros(1)

    def reset(self) -> None:
        """Drops what it carries."""
        self.hidden = torch.zeros(1)

    def forward(self, x: Tensor) -> Any:
        """Classes; those of a recurrent network with its outputs before and after dropout."""
        raw = self.body(x)
        pred = self.head(raw)
        if not self.is_recurrent:
            return pred
        pred = pred + self.hidden
        self.hidden = pred.detach().mean().reshape(1) / 8
        raw = raw.view(-1, 2, 2)
        return pred, raw, raw * 0.5


def learner_for(names: Iterable[str], path: Any = ".") -> ll.Learner:
    """A learner with TrainEvalCallback and Recorder on which these callbacks train, the same every time.

    What they need is there: two parameter groups, a recurrent network and who stores what it carries, a schedule-free
    optimizer.
    """
    names = set(names)
    with preserved_randomness():
        torch.manual_seed(0)
        x, y = torch.rand(N_TRAIN, 1, 4, 4), torch.arange(N_TRAIN) % 3
        model = Network(not names.isdisjoint(RECURRENT))
    dls = ll.DataLoaders(ll.TensorLoader(x, y, bs=BS, shuffle=True), ll.TensorLoader(x, y, bs=2 * BS), device="cpu")
    dls.seed = 42
    needed = [name for name in RECURRENT[:2] if model.is_recurrent and name not in names]
    learn = ll.Learner(
        *(dls, model, ll.CrossEntropyLossFlat(), _optimizer_for(names), 0.05),
        splitter={"body.*": {}, "head.*": {}},
        path=path,
        default_cbs=False,
        cbs=[ll.TrainEvalCallback(), ll.Recorder(), *map(made, needed)],
    )
    learn.logger, learn.create_mbar = noop, False
    return learn


def _optimizer_for(names: set[str]) -> Any:
    if "ScheduleFreeCallback" not in names:
        return ll.SGD
    return partial(importlib.import_module("schedulefree").SGDScheduleFree, foreach=False)
