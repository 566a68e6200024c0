"""The record of a training: losses, rates, a row of numbers per epoch."""

import copy
import time
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop import plots
from learnloop.loop.callback import Callback
from learnloop.metrics import AvgLoss, AvgSmoothLoss, Metric, blend


class Recorder(Callback):
    """Keeps what a fit was: `losses`, `lrs`, `values` (a row per epoch), `history`; hands each row to `learn.logger`.

    Runs that are not a fit (validate, get_preds, nested ones) leave the record of the training alone.
    """

    order = 50
    remove_on_fetch = True

    def __init__(
        self,
        add_time: bool = True,  # a column with the epoch's duration
        train_metrics: bool = False,  # metrics on the training set too
        valid_metrics: bool = True,  # loss and metrics on the validation set
        beta: float = 0.98,  # weight of the past in the smoothed training loss
    ):
        self.add_time, self.train_metrics, self.valid_metrics, self.beta = add_time, train_metrics, valid_metrics, beta
        self._rows: list[_Row] = []  # being filled: the epoch's, and one for each run nested in it
        self._trial: tuple[Any, dict[str, list[float]]] | None = None  # what the finder kept, and its hypers
        self._begin_record()

    # What the loop kept, brought to the host when somebody looks

    @property
    def lrs(self) -> list[float]:
        """The learning rate of the last group, one per recorded training batch."""
        return self._kept().rates

    @property
    def losses(self) -> list[Tensor]:
        """The smoothed training loss after each recorded batch."""
        self._catch_up()
        return self._losses

    @property
    def raw_losses(self) -> list[float]:
        """The training loss of each recorded batch, as it was."""
        return self._kept().since(0)

    @property
    def smooth_loss(self) -> AvgSmoothLoss:
        """The metric behind `losses`: `.value`, `.count`, `.beta`."""
        self._catch_up()
        return self._smooth

    @property
    def hps(self) -> dict[str, list[float]]:
        """Hypers by name, one value per training batch, from schedules."""
        return self._hps if self._trial is None else self._trial[1]

    @hps.setter
    def hps(self, hps: dict[str, list[float]]) -> None:
        self._hps = hps

    def _kept(self) -> Any:
        return self.learn._kept if self._trial is None else self._trial[0]

    def _catch_up(self) -> None:
        new = self._kept().since(len(self._losses)) if self.learn is not None else []
        if new:
            self._losses += torch.tensor(_smoothed(new, self._smooth)).unbind()

    def _show(self, trial: tuple[Any, dict[str, list[float]]] | None) -> None:
        """Lets `lrs`, `losses` and `hps` be those of the finder, or of the run that the loop keeps."""
        self._trial, self._smooth = trial, AvgSmoothLoss(self.beta)
        self._losses: list[Tensor] = []

    # The events

    def before_fit(self) -> None:
        """A training begins its record anew; other runs do not touch it."""
        self._rows = []
        if self.run_train != self.train_metrics:  # without them it has nothing to do in a training batch
            self.run_train = self.train_metrics
        if self.learn.task == "fit":
            self._begin_record()
            self.metric_names = self._names()
        elif self.learn.task == "lr_find":
            self._show(None)

    def _begin_record(self) -> None:
        self._show(None)
        self.iters: list[int] = []  # losses recorded at the end of each epoch
        self.values: L = L()  # a row of numbers per epoch, without epoch and time
        self.history: list[dict[str, Any]] = []  # the same as dicts, with epoch and time
        self.log: L = L()  # the last whole row
        self.metric_names = L()  # the columns of a row
        self.hps = {}

    def _names(self) -> L:
        """The columns of a row: epoch, training, validation, time."""
        metrics = [m.name for m in self.learn.metrics]
        has_valid = self.valid_metrics and self.learn._loader(1) is not None
        if self.train_metrics and has_valid:
            columns = [f"{p}_{n}" for p in ("train", "valid") for n in ("loss", *metrics)]
        elif has_valid:
            columns = ["train_loss", "valid_loss", *metrics]
        else:
            columns = ["train_loss", *(metrics if self.train_metrics else [])]
        return L("epoch", *columns, *(["time"] if self.add_time else []))

    def before_epoch(self) -> None:
        self._rows = [_Row(self.learn)]

    def before_train(self) -> None:
        self._row().begin_train(self.train_metrics and self.learn.task == "fit")

    def before_validate(self) -> None:
        learn = self.learn
        if not self._rows or self._rows[-1].depth != learn._depth:
            self._rows.append(_Row(learn))
        self._row().begin_validate(self.valid_metrics or learn.task != "fit")

    def after_batch(self) -> None:
        learn = self.learn
        metrics = self._rows[-1].metrics if self._rows else ()
        if learn.pred is None or (learn._raw_loss is None and learn._loss is None):
            metrics = [m for m in metrics if self._has_what_it_needs(m)]
        for metric in metrics:
            metric.accumulate(learn)

    def _has_what_it_needs(self, metric: Metric) -> bool:
        """Of a batch that was cancelled or has no targets, only what was made in it counts."""
        learn = self.learn
        if isinstance(metric, AvgLoss):
            return learn._raw_loss is not None or learn._loss is not None
        return learn.pred is not None and bool(len(learn.yb))

    def after_cancel_train(self) -> None:
        self._row().cancelled_train = True

    def after_cancel_validate(self) -> None:
        self._row().cancelled_validate = True

    def after_train(self) -> None:
        self._row().end_train(self.smooth_loss.value)

    def after_validate(self) -> None:
        self._row().end_validate()
        self.learn.final_record = L(self._row().valid or [])

    def cleanup_validate(self) -> None:
        if self._rows:
            self._rows[-1].metrics = []
            if self._rows[-1].depth:
                self._rows.pop()

    def cleanup_train(self) -> None:
        if self._rows:
            self._rows[-1].metrics = []

    def after_epoch(self) -> None:
        """Stores the row and hands it to the logger; an epoch in which no phase began has none."""
        learn = self.learn
        row = self._row()
        if learn.task != "fit" or not row.began:
            return
        numbers = L(row.numbers(len(self.metric_names) - 1 - self.add_time, self.train_metrics))
        learn.final_record = numbers
        self.values.append(numbers.copy())
        self.log = L([learn.epoch, *numbers, *([_clock(row.seconds())] if self.add_time else [])])
        self.history.append(dict(zip(self.metric_names, self.log, strict=True)))
        self.iters.append(len(self._kept()))
        learn.logger(self.log)

    def cleanup_epoch(self) -> None:
        self._rows = []

    def _row(self) -> "_Row":
        if not self._rows:  # events sent by hand, outside of an epoch
            self._rows.append(_Row(self.learn))
        return self._rows[-1]

    # What survives a resume

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, and the row being filled with its half-way metrics."""
        row = self._rows[0].state_dict() if self._rows else None
        names = ("iters", "values", "history", "log", "metric_names")
        return {**{n: getattr(self, n) for n in names}, "hps": self._hps, "row": row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        row = state.pop("row")
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._show(None)  # made again from the losses that the loop keeps
        if row is not None and self._rows:
            self._rows[0].load_state_dict(row)

    # Looking at it

    def to_frame(self) -> Any:
        """The history as a pandas DataFrame, a row per epoch."""
        import pandas as pd

        return pd.DataFrame(self.history, columns=list(self.metric_names))

    def plot_loss(
        self,
        skip_start: int = 5,  # first batches to leave out
        with_valid: bool = True,  # the validation loss at the end of each epoch
        log: bool = False,  # both axes logarithmic
        show_epochs: bool = False,  # a dotted line where each epoch ended
        ax: Any = None,  # matplotlib axes; None: the current ones
    ) -> Any:
        """The learning curve: raw and smoothed training loss, validation loss; returns the axes."""
        names = list(self.metric_names)
        has_valid = with_valid and "valid_loss" in names
        column = names.index("valid_loss") - 1 if has_valid else 0
        valid = [row[column] for row in self.values] if has_valid else []
        losses = self.learn._kept.since(0)  # of the training, also while `losses` shows the finder's pass
        return plots.plot_losses(
            ax,
            losses,
            _smoothed(losses, AvgSmoothLoss(self.beta)),
            self.iters if has_valid else (),
            valid,
            skip_start=skip_start,
            log=log,
            epoch_iters=self.iters if show_epochs else (),
        )

    def plot_sched(self, keys: Any = None, figsize: tuple[float, float] | None = None) -> Any:
        """Every scheduled hyper over the training batches; `keys` picks some. Returns the figure."""
        names = list(self.hps) if keys is None else [keys] if isinstance(keys, str) else list(keys)
        unknown = [n for n in names if n not in self.hps]
        if unknown:
            raise ValueError(
                f"no schedule of {', '.join(unknown)} was recorded; there is {', '.join(self.hps) or 'none'}."
            )
        return plots.plot_schedules({n: self.hps[n] for n in names}, figsize)

    def plot_lr_find(
        self,
        skip_end: int = 5,  # last batches to leave out, where losses diverge
        return_fig: bool = True,
        suggestions: Any = None,  # points (rate, loss) to mark
        nms: Any = None,  # a name for each of them
        ax: Any = None,  # matplotlib axes; None: a new figure
    ) -> Any:
        """The smoothed loss over the learning rate, as `lr_find` left it; returns the figure."""
        if not self.losses:
            raise RuntimeError("there is no pass of the finder to plot. Run `learn.lr_find()` first.")
        end = max(len(self.losses) - skip_end, 1)
        points = list(suggestions or [])
        names = list(nms or [""] * len(points))
        losses = [float(loss) for loss in self.losses[:end]]
        ax = plots.plot_rates(ax, self.lrs[:end], losses, list(zip(names, points, strict=True)))
        return ax.figure if return_fig else None


class _Row:
    """One epoch's numbers while they come in, or those of a run nested in it."""

    def __init__(self, learn: Any):
        self.learn, self.depth, self.start = learn, learn._depth, time.monotonic()
        self.train: list[Any] | None = None  # numbers of the training phase; None before its end
        self.valid: list[Any] | None = None
        self.began = self.cancelled_train = self.cancelled_validate = False
        self.metrics: list[Metric] = []  # that take in each batch of the phase that is running

    def begin_train(self, with_metrics: bool) -> None:
        self._begin([*self.learn.metrics] if with_metrics else [])

    def begin_validate(self, with_metrics: bool) -> None:
        metrics = [AvgLoss(), *self.learn.metrics] if with_metrics else []
        self._begin(_copies(metrics) if self.depth else metrics)

    def _begin(self, metrics: list[Metric]) -> None:
        self.began, self.metrics = True, metrics
        for metric in metrics:
            metric.reset()

    def end_train(self, smooth_loss: Any) -> None:
        values = [_number(smooth_loss), *(_number(m.value) for m in self.metrics)]
        self.train = [None] * len(values) if self.cancelled_train else values

    def end_validate(self) -> None:
        self.valid = [] if self.cancelled_validate else [_number(m.value) for m in self.metrics]

    def numbers(self, n: int, train_metrics: bool) -> list[Any]:
        """All columns of the epoch; None for those of a phase that was cancelled or never ended."""
        n_train = 1 + (len(self.learn.metrics) if train_metrics else 0)
        train = (self.train or []) + [None] * n_train
        return (train[:n_train] + (self.valid or []) + [None] * n)[:n]

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def state_dict(self) -> dict[str, Any]:
        metrics = [m.state_dict() for m in self.metrics]
        return {"train": self.train, "began": self.began, "seconds": self.seconds(), "metrics": metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.train, self.began = state["train"], state["began"]
        self.start = time.monotonic() - state["seconds"]
        for metric, metric_state in zip(self.metrics, state["metrics"], strict=False):
            metric.load_state_dict(metric_state)


def _smoothed(losses: list[float], smooth: AvgSmoothLoss) -> list[float]:
    """The smoothed loss after each of `losses`; moves `smooth` on."""
    smoothed = []
    for loss in losses:
        smooth.val, smooth.count = blend(loss, smooth.val, smooth.beta), smooth.count + 1
        smoothed.append(smooth.val / (1 - smooth.beta**smooth.count))
    return smoothed


def _copies(metrics: list[Metric]) -> list[Metric]:
    """Metrics of their own for a nested run: those of the outer one may be half-way."""
    return [copy.deepcopy(m) for m in metrics]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _clock(seconds: float) -> str:
    """(h:)mm:ss, as the table shows it."""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m:02d}:{s:02d}"
