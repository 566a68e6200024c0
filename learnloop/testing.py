"""For tests and lessons: a tiny learner, a log of events, and a check of what a callback promises."""

import difflib
import io
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fastcore.basics import noop
from fastcore.foundation import L
from torch import Tensor, nn

from learnloop.callbacks.modes import TrainEvalCallback
from learnloop.callbacks.recorder import Recorder
from learnloop.checks.case import Case
from learnloop.checks.promises import checked
from learnloop.checks.report import CallbackReport
from learnloop.checks.scenes import HEARD
from learnloop.data.batches import to_detach
from learnloop.data.keyed import preserved_randomness
from learnloop.data.loaders import DataLoaders, TensorLoader
from learnloop.learner import Learner
from learnloop.loop.callback import Callback
from learnloop.loop.events import unknown_event
from learnloop.optim.algorithms import SGD

__all__ = ["CallbackReport", "EventLog", "check_callback", "toy_learner"]


# A tiny learner


def toy_learner(
    n_train: int = 32,  # training samples
    n_valid: int = 16,  # validation samples; 0: no validation loader
    bs: int = 8,
    model: Any = None,  # takes (bs, 2), returns (bs, 1); None: two linear layers
    cbs: Any = None,  # beside TrainEvalCallback and Recorder
    **learner_kwargs: Any,
) -> Learner:
    """A learner for a regression, trained in milliseconds on the CPU, with the same numbers every time.

    It prints nothing: there is no ProgressCallback, and `logger` takes rows without showing them. Making it moves no
    random generator.
    """
    options = {"loss_func": nn.MSELoss(), "opt_func": SGD, "lr": 0.1, "default_cbs": False, **learner_kwargs}
    quiet = [] if "default_cbs" in learner_kwargs else [TrainEvalCallback(), Recorder()]
    learn = Learner(
        _toy_loaders(n_train, n_valid, bs), _toy_model() if model is None else model, cbs=[*quiet, *L(cbs)], **options
    )
    learn.logger, learn.create_mbar = noop, False
    return learn


def _toy_loaders(n_train: int, n_valid: int, bs: int) -> DataLoaders:
    valid = [TensorLoader(*_toy_data(n_valid, 0.9), bs=bs)] if n_valid else []
    dls = DataLoaders(TensorLoader(*_toy_data(n_train, 1.0), bs=bs, shuffle=True), *valid, device="cpu")
    dls.seed = 42
    return dls


def _toy_data(n: int, reach: float) -> tuple[Tensor, Tensor]:
    t = torch.linspace(-reach, reach, n)[:, None]
    return torch.cat([t, t**2], 1), 2 * t - t**2 + 0.5


def _toy_model() -> nn.Module:
    with preserved_randomness():
        torch.manual_seed(42)
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


# A log of events


class EventLog(Callback):
    """Notes the events it hears in `events`: names, or tuples of name and values with `EventLog("epoch", "iter")`."""

    reads_only = True

    def __init__(
        self,
        *attributes: str,  # of the learner, read at each event; None where it has none
        cleanups: bool = True,  # note the cleanups too
        order: float = 0,
    ):
        self.attributes, self.cleanups, self.order = attributes, cleanups, order
        self.events: list[Any] = []

    def __call__(self, event_name: str) -> None:
        if self.cleanups or not event_name.startswith("cleanup_"):
            values = [to_detach(getattr(self.learn, n, None), cpu=False) for n in self.attributes]
            self.events.append((event_name, *values) if values else event_name)

    def check(self, expected: str | Sequence[Any]) -> None:
        """Compares `events` with a list, or with names in a string; AssertionError that shows the difference."""
        wanted = expected.split() if isinstance(expected, str) else list(expected)
        if self.events != wanted:
            before, now = [str(e) for e in wanted], [str(e) for e in self.events]
            difference = difflib.unified_diff(before, now, "expected", "heard", lineterm="", n=2)
            raise AssertionError("other events than expected:\n" + "\n".join(difference))


# A check of a callback


def check_callback(
    make: Callable[[], Any],  # a class, or a function without arguments that makes a callback, or several
    make_learner: Callable[[], Learner] | None = None,  # whose loaders make new tensors for each batch; None: a toy
    events: Sequence[str] = HEARD,  # at which something is raised
) -> CallbackReport:
    """Checks that a callback keeps the promises of the loop; AssertionError with the report where it breaks one.

    - Every cancel and an error are raised before and after it at every event, in training and in validation: the
      learner must be left clean and train again with the same numbers.
    - Removed after a fit or in the middle of one it leaves no trace. Its state survives a file. A fit that is stopped
      in the middle, and resumed by a learner made anew with other weights to begin with, ends with the same numbers.
    - Its place among the learner's callbacks does not depend on when it was added. It works in bfloat16 and with
      accumulated gradients, or refuses them before the first batch. One that says `reads_only` moves nothing.
    - How often it makes a training batch wait for the device is counted: `report.host_reads`.

    Takes a second or two with the toy learner.
    """
    if not callable(make) or isinstance(make, Callback):
        raise TypeError(f"`{make!r}` makes no callback; pass the class, or a function that makes one.")
    for name in {*events} - {*HEARD}:
        raise ValueError(unknown_event(name))
    began = time.perf_counter()
    with preserved_randomness(), torch.enable_grad(), redirect_stdout(io.StringIO()), TemporaryDirectory() as folder:
        case = Case(make, make_learner or _small_toy, events, Path(folder))
        verdicts = checked(case)
    report = CallbackReport(case.name, case.n_runs, time.perf_counter() - began, verdicts, case.host_reads)
    if report.broken:
        raise AssertionError(str(report))
    return report


def _small_toy() -> Learner:
    return toy_learner(n_train=16, n_valid=8)
