"""The record of a training: losses, rates, a row of numbers per epoch."""

import copy
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from fastcore.foundation import L
from torch import Tensor

from learnloop import html, plots
from learnloop.data.loaders import names_of
from learnloop.loop.callback import Callback
from learnloop.metrics import AvgLoss, AvgSmoothLoss, Metric, blend, check_on, of_phase


class Recorder(Callback):
    """Keeps what a fit was: `losses`, `lrs`, `values` (a row per epoch), `history`; hands each row to `learn.logger`.

    The columns of a named validation set begin with its name, as `noisy_loss` and `noisy_accuracy`, and are None in an
    epoch in which it is not validated. Those of `valid` are `valid_loss` and `accuracy`, or `valid_accuracy` with
    `train_metrics`. A metric that says itself where it is computed, as `mk_metric(accuracy, on="both")`, follows
    neither `train_metrics` nor `valid_metrics`; its column for the training is `train_accuracy`.

    Runs that are not a fit (validate, get_preds, nested ones) leave the record of the training alone.
    """

    order = 50
    reads_only = True
    remove_on_fetch = True
    tasks = ("fit", "lr_find", "validate")  # predictions need no metrics, and may have no targets

    def __init__(
        self,
        add_time: bool = True,  # a column with the epoch's duration
        train_metrics: bool = False,  # metrics on the training set too
        valid_metrics: bool = True,  # loss and metrics on the validation set
        beta: float = 0.98,  # weight of the past in the smoothed training loss
    ):
        self.add_time, self.train_metrics, self.valid_metrics, self.beta = add_time, train_metrics, valid_metrics, beta
        self._rows: list[_Row] = []  # being filled: the epoch's, and one for each run nested in it
        self._columns: dict[str, list[str]] = {}  # titles of a row's numbers: of the training, then of each set
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
        if self._new_losses:  # who only looks at the last one does not keep a tensor for each batch
            self._losses += torch.tensor(self._new_losses).unbind()
            self._new_losses.clear()
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

    def newest_smooth(self) -> Tensor | float | None:
        """The smoothed loss after the newest batch whose loss is on the host: nothing waits for an accelerator."""
        self._catch_up(waits=False)
        return self._smooth.value if self._smooth.count else None

    def _catch_up(self, waits: bool = True) -> None:
        n_seen = len(self._losses) + len(self._new_losses)
        if self.learn is not None:
            kept = self._kept()
            self._new_losses += _smoothed(kept.since(n_seen) if waits else kept.arrived(n_seen), self._smooth)

    def _show(self, trial: tuple[Any, dict[str, list[float]]] | None) -> None:
        """Lets `lrs`, `losses` and `hps` be those of the finder, or of the run that the loop keeps."""
        self._trial, self._smooth = trial, AvgSmoothLoss(self.beta)
        self._losses: list[Tensor] = []
        self._new_losses: list[float] = []  # smoothed like these, that nobody has asked for as tensors yet

    # The events

    def before_fit(self) -> None:
        """A training begins its record anew; other runs do not touch it."""
        self._rows = []
        for metric in self.learn.metrics:
            check_on(metric)
        wanted = self.train_metrics or bool(of_phase(self.learn.metrics, "train", False))
        if self.run_train != wanted:  # without metrics it has nothing to do in a training batch
            self.run_train = wanted
        if self.learn.task == "fit":
            self._begin_record()
            sets = self._sets()
            self._columns = columns(self.learn.metrics, sets, self.train_metrics, self.valid_metrics)
            self.metric_names = L("epoch", *chain(*self._columns.values()), *(["time"] if self.add_time else []))
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

    def _sets(self) -> list[str]:
        """The names of the validation sets."""
        return [name for name in names_of(self.learn.dls)[1:] if name is not None]

    def before_epoch(self) -> None:
        self._rows, self.start_epoch = [_Row(self.learn)], time.time()

    def before_train(self) -> None:
        learn = self.learn
        self._row().begin(of_phase(learn.metrics, "train", self.train_metrics) if learn.task == "fit" else [])

    def before_validate(self) -> None:
        learn = self.learn
        if not self._rows or self._rows[-1].depth != learn._depth:
            self._rows.append(_Row(learn))
        wanted = self.valid_metrics or learn.task != "fit"
        metrics = [*([AvgLoss()] if wanted else []), *of_phase(learn.metrics, "valid", wanted)]
        self._row().begin(_copies(metrics, learn) if learn._depth else metrics)

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
        self._row().cancelled = True

    def after_cancel_validate(self) -> None:
        self._row().cancelled = True

    def after_train(self) -> None:
        self._row().end_train(self.smooth_loss.value)

    def after_validate(self) -> None:
        self.learn.final_record = L(self._row().end_validate(self.learn.dl_name))

    def cleanup_validate(self) -> None:
        self._close_phase()
        if self._rows and self._rows[-1].depth:
            self._rows.pop()

    def cleanup_train(self) -> None:
        self._close_phase()

    def _close_phase(self) -> None:
        if self._rows:
            self._rows[-1].metrics, self._rows[-1].cancelled = [], False

    def after_epoch(self) -> None:
        """Stores the row and hands it to the logger; an epoch in which no phase began has none."""
        learn = self.learn
        row = self._row()
        if learn.task != "fit" or not row.began:
            return
        numbers = L(row.numbers(self._columns))
        learn.final_record = numbers
        self.values.append(numbers.copy())
        self.log = L([learn.epoch, *numbers, *([_clock(row.seconds())] if self.add_time else [])])
        self.history.append(dict(zip(self.metric_names, self.log, strict=True)))
        self.iters.append(len(self._kept()))
        learn.logger(self.log)

    def cleanup_epoch(self) -> None:
        """Lets go of what metrics gathered, which may be the predictions of a whole set."""
        if self._rows and self._rows[0].began:
            for metric in self.learn.metrics:
                metric.reset()
        self._rows = []

    def _row(self) -> "_Row":
        if not self._rows:  # events sent by hand, outside of an epoch
            self._rows.append(_Row(self.learn))
        return self._rows[-1]

    # What survives a resume

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, and the row being filled with its half-way metrics."""
        row = self._row_state() if self._rows else None
        names = ("iters", "values", "history", "log", "metric_names")
        return {**{n: getattr(self, n) for n in names}, "hps": self._hps, "row": row}

    def _row_state(self) -> dict[str, Any]:
        """The epoch's row; the batch that the loop has counted is in it also before this callback has heard of it."""
        row = self._rows[0]
        if not self._is_behind():
            return row.state_dict()
        metrics, row.metrics = row.metrics, _copies(row.metrics, self.learn)
        try:
            self.after_batch()
            return row.state_dict()
        finally:
            row.metrics = metrics

    def _is_behind(self) -> bool:
        """Whether a callback asks that hears of a training batch before this one."""
        learn = self.learn
        for handlers, running in learn._running_events() if learn.training and not learn._depth else ():
            if self.after_batch in handlers and running in handlers:
                return handlers.index(running) < handlers.index(self.after_batch)
        return False

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

    def _repr_html_(self) -> str:
        """The rows of the training as a table."""
        rows = [[row.get(name) for name in self.metric_names] for row in self.history]
        return html.table(rows, list(self.metric_names), "Recorder" if rows else "Recorder: no epoch yet")

    def plot(self, figsize: tuple[float, float] | None = None) -> Any:
        """Losses, metrics and scheduled hypers in one figure, axes for each; returns the figure.

        `figsize` in inches, default 6 by 4 for each.
        """
        metrics = self._metric_columns()
        fig, axes = plots.subplots(1 + len(metrics) + len(self.hps), figsize=figsize)
        self.plot_loss(ax=axes[0])
        plots.plot_columns(axes[1 : 1 + len(metrics)], self.history, metrics)
        plots.plot_values(axes[1 + len(metrics) :], self.hps)
        return fig

    def plot_metrics(self, figsize: tuple[float, float] | None = None) -> Any:
        """The metrics over the epochs, axes for each with a line per set of data; returns the figure."""
        metrics = self._metric_columns()
        if not metrics:
            raise ValueError("no metric was recorded. Pass `Learner(…, metrics=accuracy)` and train.")
        fig, axes = plots.subplots(len(metrics), figsize=figsize)
        plots.plot_columns(axes, self.history, metrics)
        return fig

    def _metric_columns(self) -> dict[str, list[str]]:
        """The columns of each metric, by its name: those of the training and of every validation set."""
        sets = ["train", *self._sets()]
        names = {m: [m, *(f"{s}_{m}" for s in sets)] for m in dict.fromkeys(m.name for m in self.learn.metrics)}
        found = {m: [c for c in columns if c in self.metric_names] for m, columns in names.items()}
        return {m: columns for m, columns in found.items() if columns and self.history}

    def plot_loss(
        self,
        skip_start: int = 5,  # first batches to leave out
        with_valid: bool = True,  # the validation losses at the end of each epoch
        log: bool = False,  # both axes logarithmic
        show_epochs: bool = False,  # a dotted line where each epoch ended
        ax: Any = None,  # matplotlib axes; None: the current ones
    ) -> Any:
        """The learning curve: raw and smoothed training loss, the loss of each validation set; returns the axes."""
        names = list(self.metric_names)
        places = {name: names.index(f"{name}_loss") - 1 for name in self._sets() if f"{name}_loss" in names}
        valid = {name: [row[i] for row in self.values] for name, i in places.items()} if with_valid else {}
        losses = self.learn._kept.since(0)  # of the training, also while `losses` shows the finder's pass
        return plots.plot_losses(
            ax,
            losses,
            _smoothed(losses, AvgSmoothLoss(self.beta)),
            self.iters if valid else (),
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
        self.train: list[Any] = []  # numbers of the training phase; none before its end, or where it was cancelled
        self.sets: dict[str | None, list[Any]] = {}  # the same of each validation set that was run, by name
        self.began = False  # a phase
        self.cancelled = False  # the phase that is running
        self.metrics: list[Metric] = []  # that take in each batch of the phase that is running

    def begin(self, metrics: list[Metric]) -> None:
        self.began, self.metrics = True, metrics
        for metric in metrics:
            metric.reset()

    def end_train(self, smooth_loss: Any) -> None:
        self.train = [] if self.cancelled else [_number(smooth_loss), *self._values()]

    def end_validate(self, name: str | None) -> list[Any]:
        """The numbers of the set."""
        self.sets[name] = [] if self.cancelled else self._values()
        return self.sets[name]

    def _values(self) -> list[Any]:
        return [_number(m.value) for m in self.metrics]

    def numbers(self, columns: dict[str, list[str]]) -> list[Any]:
        """All columns of the epoch; None for those of a phase that was cancelled, never ended or was not due."""
        phases = [(self.train if name == "train" else self.sets.get(name, []), len(c)) for name, c in columns.items()]
        return [number for numbers, n in phases for number in (numbers + [None] * n)[:n]]

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


def columns(
    metrics: Sequence[Metric], sets: Iterable[str], train_metrics: bool, valid_metrics: bool
) -> dict[str, list[str]]:
    """The titles of a row's numbers: those of the training by the key `train`, and those of each validation set.

    As in fastai, the metrics of `valid` have no prefix, unless `train_metrics` puts the same ones beside them; and
    neither have those of the training where they are the only ones.
    """
    sets = list(sets)
    side_by_side = train_metrics and valid_metrics and bool(sets)
    in_train = of_phase(metrics, "train", train_metrics)
    titles = [m.name if m.on is None and not side_by_side else f"train_{m.name}" for m in in_train]
    found = {"train": ["train_loss", *titles]}
    for name in sets:
        prefix = "" if name == "valid" and not side_by_side else f"{name}_"
        titles = [f"{prefix}{m.name}" for m in of_phase(metrics, "valid", valid_metrics)]
        found[name] = [*([f"{name}_loss"] if valid_metrics else []), *titles]
    return found


def _copies(metrics: list[Metric], learn: Any) -> list[Metric]:
    """Metrics of their own for a nested run: those of the outer one may be half-way. What they read is not copied."""
    read = [learn, learn.model, learn.loss_func, learn.dls, *learn.cbs]
    return [copy.deepcopy(m, {id(thing): thing for thing in read}) for m in metrics]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _clock(seconds: float) -> str:
    """(h:)mm:ss, as the table shows it."""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m:02d}:{s:02d}"
