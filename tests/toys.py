"""Tiny learners and callbacks for the tests: a line fitted to three batches, and callbacks that note or raise."""

import torch
import torch.nn.functional as F
from torch import nn

from learnloop import SGD, Callback, DataLoaders, Learner, TensorLoader
from learnloop.loop.events import EVENTS


def tensor_loader(n_batch, bs=2, **kwargs):
    """Batches of `bs` points of the line y = 2x + 1, x from 0 to 1."""
    x = torch.linspace(0, 1, n_batch * bs)[:, None]
    return TensorLoader(x, 2 * x + 1, bs=bs, **kwargs)


def loaders(n_train=2, n_valid=1, **kwargs):
    """Two training batches and one for validation; `n_valid=None` leaves validation out."""
    valid = [] if n_valid is None else [tensor_loader(n_valid)]
    return DataLoaders(tensor_loader(n_train, **kwargs), *valid, device="cpu")


def learner(cbs=None, dls=None, model=None, loss_func=F.mse_loss, default_cbs=False, seed=0, cls=Learner, **kwargs):
    """A line, SGD with a rate of 0.1, no callbacks but those given."""
    torch.manual_seed(seed)
    model = nn.Linear(1, 1) if model is None else model
    kwargs = {"opt_func": SGD, "lr": 0.1, **kwargs}
    return cls(loaders() if dls is None else dls, model, loss_func, cbs=cbs, default_cbs=default_cbs, **kwargs)


class Heard(Callback):
    """Writes down every event, before any other callback hears it; the cleanups after all others."""

    order = -1000

    def __init__(self, events=EVENTS):
        super().__init__(**{name: _note(name) for name in events})
        self.events = []

    def __str__(self):
        return " ".join(self.events)


def _note(name):
    return lambda cb: cb.events.append(name)


class Once(Callback):
    """Does something with itself the first time that an event fires, in one phase if that is said."""

    def __init__(self, event_name, action, training=None):
        super().__init__(**{event_name: Once._act})
        self.action, self.phase, self.done = action, training, False

    def _act(self):
        if not self.done and self.phase in (None, self.learn.training):
            self.done = True
            return self.action(self)


def raising(error):
    """An action for `Once`."""

    def action(cb):
        raise error

    return action


def raise_at(event_name, error, training=None):
    """A callback that raises an exception the first time that an event fires."""
    return Once(event_name, raising(error), training)


def weights(learn):
    """The model's parameters as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])


class Noise(Callback):
    """Adds something to the inputs, in training."""

    order, run_valid = 5, False

    def before_batch(self):
        self.learn.xb = (self.x + 1,)


class Shrink(Callback):
    """Another that changes the inputs, in both phases."""

    order = 7

    def before_batch(self):
        self.x.mul_(0.5)
