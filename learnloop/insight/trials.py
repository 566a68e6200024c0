"""Short runs of a learner of which nothing stays: batches read, a few updates made, batches evaluated."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from learnloop.callbacks.data import BatchTransform
from learnloop.callbacks.gradients import GradientAccumulation
from learnloop.callbacks.mixing import MixHandler
from learnloop.callbacks.sampling import OverfitBatch, WeightedSampling
from learnloop.data.batches import to_detach
from learnloop.data.keyed import Key, batches, is_keyed, is_list, preserved_randomness
from learnloop.data.loaders import known_n_inp
from learnloop.insight.findings import NotApplicable
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelTrainException
from learnloop.loop.fits import FitCall, run_trial
from learnloop.loop.passes import close
from learnloop.optim.algorithms import Adam


class Ready(list[Any]):
    """Batches made beforehand, as a loader that says how many of their elements are inputs."""

    def __init__(self, made: Any, learn: Any):
        super().__init__(made)
        n_inp = known_n_inp(learn.dls, learn._loader(0))
        if n_inp is not None:
            self.n_inp = n_inp


def read(learn: Any, dl: Any, n: int, seed: int = 0) -> Ready:
    """The first `n` batches of a pass over a loader; its order and its augmentation follow the seed."""
    check_readable(dl)
    with preserved_randomness():
        seed_generators(seed)
        keyed = is_list(dl) or is_keyed(dl, getattr(learn.dls, "keyed", True))
        stream = batches(dl, Key(seed, seed)) if keyed else iter(dl)
        try:
            return Ready(islice(stream, n), learn)
        finally:
            close(stream)


def check_readable(dl: Any) -> None:
    """NotApplicable for a loader that can be read only once."""
    if iter(dl) is dl:
        raise NotApplicable("the loader is an iterator: what is read from it now would be missing from the training.")


def seed_generators(seed: int) -> None:
    """Sets the global generators; who calls it has preserved them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def bare(learn: Any) -> Iterator[None]:
    """A context without callbacks that only show or record, or that change training batches and their number."""
    changing = (MixHandler, GradientAccumulation, OverfitBatch, WeightedSampling)
    away = [cb for cb in learn.cbs if cb.reads_only or isinstance(cb, changing)]
    away += [cb for cb in learn.cbs if isinstance(cb, BatchTransform) and not cb.run_valid]
    with learn.removed_cbs(away):
        yield


class Probe(Callback):
    """Calls functions of the learner at events of a run, after all other callbacks; ends the training at a moment."""

    order = 10_000

    def __init__(self, seconds: float = float("inf"), **functions: Callable[[Any], Any]):
        super().__init__(**{event: _of_learner(function) for event, function in functions.items()})
        self.seconds = seconds  # of training, after which it ends
        self.losses: list[Any] = []  # of the training batches, detached

    def before_train(self) -> None:
        self._end = time.perf_counter() + self.seconds

    def cleanup_batch(self) -> None:
        learn = self.learn
        if learn.training:
            self.losses.append(learn._finished_loss())

    def before_batch(self) -> None:
        if self.learn.training and time.perf_counter() > self._end:
            raise CancelTrainException


def _of_learner(function: Callable[[Any], Any]) -> Callable[[Callback], Any]:
    return lambda cb: function(cb.learn)


def train(
    learn: Any,
    dl: Any,  # what it trains on; lists are gone over again and again
    n_step: int,
    probe: Probe,
    lr: float = 1e-3,
    then: Callable[[], Any] = lambda: None,  # called with the trained weights in place
) -> list[float]:
    """Trains for `n_step` updates with an Adam of its own, and undoes it; returns the losses."""
    if not any(p.requires_grad for p in learn._parameters()):
        raise NotApplicable("the model has no parameter to train.")
    own = {"opt": None, "opt_func": Adam, "lr": lr, "wd": None}
    call = FitCall(None, lr=lr, cbs=probe, n_step=n_step).checked(learn, "check")
    with bare(learn), _replaced(learn, own), preserved_randomness():
        run_trial(learn, "lr_find", call, dl, then)
    return [float(loss) for loss in probe.losses if loss is not None]


@contextmanager
def _replaced(learn: Any, own: dict[str, Any]) -> Iterator[None]:
    former = {name: learn.__dict__[name] for name in own}
    trainable = [(p, p.requires_grad) for p in learn._parameters()]
    learn.__dict__.update(own)
    try:
        yield
    finally:
        learn.__dict__.update(former)
        for p, requires_grad in trainable:
            p.requires_grad_(requires_grad)


def evaluate(learn: Any, ready: Ready, seed: int = 0, probe: Probe | None = None) -> list[tuple[Any, Any]]:
    """(prediction, loss) of each batch as a validation makes them, every batch under generators of the same seed."""
    found: list[tuple[Any, Any]] = []

    def note(learn: Any) -> None:
        found.append((to_detach(learn.pred), None if learn._raw_loss is None else float(learn._raw_loss.detach())))

    reseed = Probe(before_batch=lambda learn: seed_generators(seed), after_loss=note)
    reseed.order = -10_000
    with bare(learn), preserved_randomness():
        probes = [reseed] if probe is None else [reseed, probe]
        learn._run_beside("validate", probes, lambda: learn._do_epoch_validate(dl=ready))
    return found


def modules_of(learn: Any) -> dict[str, nn.Module]:
    """The modules of the model by name, the model itself by its class."""
    model = learn.model
    return (
        {name or type(model).__name__: m for name, m in model.named_modules()} if isinstance(model, nn.Module) else {}
    )
