"""Callbacks that watch one number of the record and act on it: end the fit, save the model, lower the rate."""

import math
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from fastcore.basics import noop

from learnloop.callbacks.averaging import scored_weights
from learnloop.callbacks.recorder import Recorder
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelFitException

#: Words in a metric's name that say that a smaller value is better; `loss` and `error` say so anywhere in it.
_SMALLER_IS_BETTER = {"mse", "mae", "rmse", "msle", "rmspe", "perplexity"}


class TrackerCallback(Callback):
    """Remembers the best value of one column of the record, `best`, and whether this epoch made it, `new_best`.

    It reads the Recorder's row in `after_epoch`, and takes no part in anything but a fit. A value that is None (its
    phase was cancelled, its set was not due) says nothing; one that is no number is no improvement. Subclasses act on
    `new_best` and `wait`. Source: docs.fast.ai/callback.tracker. Cost per batch: none.
    """

    order, run_after, tasks = 60, Recorder, ("fit",)
    remove_on_fetch = _only_train_loop = True
    _stateattrs: tuple[str, ...] = ("best", "new_best", "wait")

    def __init__(
        self,
        monitor: str = "valid_loss",  # a column: train_loss, valid_loss or a metric
        comp: Callable[[Any, Any], Any] | None = None,  # (value, best) -> is it better; None: by the column's name
        min_delta: float = 0.0,  # how much better it must be
        reset_on_fit: bool = True,  # every fit has a best of its own
    ):
        if comp is not None and not callable(comp):
            raise TypeError(f"`comp={comp!r}`: pass a comparison (value, best) -> bool, such as `numpy.less`.")
        self.monitor, self.reset_on_fit = monitor, reset_on_fit
        self.comp = (np.less if smaller_is_better(monitor) else np.greater) if comp is None else comp
        self._worst = worst_of(self.comp)
        self.min_delta = -min_delta if self._worst > 0 else min_delta  # signed: `comp(value - min_delta, best)`
        self.best: Any = None  # None before the first fit, then infinite until there is a value
        self.new_best = False
        self.idx = 0  # the column's place in `recorder.values[i]`
        self.wait = 0  # epochs with a value since the best one

    def before_fit(self) -> None:
        """Finds the column; ValueError where this fit records none of that name."""
        self.new_best, self.wait = False, 0
        if self.reset_on_fit or self.best is None:
            self.best = self._worst
        self.idx = self._column()

    def _column(self) -> int:
        recorder = self.learn.__dict__.get("recorder")
        if recorder is None:
            raise RuntimeError(f"{type(self).__name__} reads the Recorder's rows: `learn.add_cb(Recorder())`.")
        columns = [name for name in recorder.metric_names if name not in ("epoch", "time")]
        if self.monitor not in columns:
            near = [c for c in columns if c in self.monitor] or get_close_matches(self.monitor, columns, n=1)
            raise ValueError(
                f"{type(self).__name__} monitors `{self.monitor}`, but this fit records {', '.join(columns)}. "
                f'Pass `monitor="{(near or columns)[0]}"`.'
            )
        return columns.index(self.monitor)

    def after_epoch(self) -> None:
        value = self._value()
        self.new_best = is_better(value, self.best, self.comp, self.min_delta)
        if self.new_best:
            self.best, self.wait = value, 0
        elif value is not None:
            self.wait += 1

    def _value(self) -> Any:
        """The column's value in this epoch; None where there is none."""
        recorder = self.learn.recorder
        has_row = bool(recorder.history) and recorder.history[-1]["epoch"] == self.learn.epoch
        return recorder.values[-1][self.idx] if has_row else None

    def _say(self, text: str) -> None:
        if self.learn.logger is not noop:  # within `no_logging` nothing is shown
            print(text)


def smaller_is_better(monitor: str) -> bool:
    """What a column's name says: of losses and errors, smaller is better; of anything else, larger."""
    return "loss" in monitor or "error" in monitor or not _SMALLER_IS_BETTER.isdisjoint(monitor.split("_"))


def worst_of(comp: Callable[[Any, Any], Any]) -> float:
    """The infinity that a comparison likes least."""
    return math.inf if comp(0.0, 1.0) else -math.inf


def is_better(value: Any, best: Any, comp: Callable[[Any, Any], Any], min_delta: float = 0.0) -> bool:
    """Whether `value` beats `best` by `min_delta`, signed as `comp(value - min_delta, best)` takes it."""
    return value is not None and bool(value == value) and bool(comp(value - min_delta, best))


class EarlyStoppingCallback(TrackerCallback):
    """Ends the fit by `CancelFitException` in `after_epoch` once `patience` epochs have brought nothing better.

    Source: docs.fast.ai/callback.tracker. Cost per batch: none.
    """

    order = TrackerCallback.order + 3

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Callable[[Any, Any], Any] | None = None,
        min_delta: float = 0.0,
        patience: int = 1,  # epochs
        reset_on_fit: bool = True,
    ):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        self.patience = patience

    def after_epoch(self) -> None:
        super().after_epoch()
        if self.wait >= max(1, self.patience):
            self._say(f"No improvement since epoch {self.learn.epoch - self.wait}: early stopping")
            raise CancelFitException


class ReduceLROnPlateau(TrackerCallback):
    """Divides the rates of all groups by `factor` whenever `patience` epochs have brought nothing better.

    It acts in `after_epoch`; a schedule of the rate would overwrite it. Source: docs.fast.ai/callback.tracker. Cost per
    batch: none.
    """

    order = TrackerCallback.order + 2

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Callable[[Any, Any], Any] | None = None,
        min_delta: float = 0.0,
        patience: int = 1,  # epochs
        factor: float = 10.0,
        min_lr: float = 0.0,  # no rate is lowered below it
        reset_on_fit: bool = True,
    ):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        self.patience, self.factor, self.min_lr = patience, factor, min_lr

    def after_epoch(self) -> None:
        super().after_epoch()
        if self.wait < max(1, self.patience):
            return
        self.wait, opt = 0, self.learn.opt
        rates = [hyper["lr"] for hyper in opt.hypers]
        lowered = [min(lr, max(lr / self.factor, self.min_lr)) for lr in rates]
        if lowered != rates:
            opt.set_hyper("lr", lowered)
            self._say(f"Epoch {self.learn.epoch}: reducing lr to {lowered[-1]}")


class SaveModelCallback(TrackerCallback):
    """Saves the best weights under `fname` and loads them when the fit is over; or the best few, or every so often.

    It saves through `learn.save`: the best and `every_epoch` in `after_epoch`, `at_end` in `after_fit`, and there the
    weights that were scored, which may be averages; `every_step` in `after_step`, and there those that are trained. At
    the end it loads only a file that it has written itself and that nobody has changed since; after Ctrl-C it
    neither loads nor saves. Source: docs.fast.ai/callback.tracker. Cost per batch: none, but for the batches that
    `every_step` names: the time of a `learn.save`.
    """

    order = TrackerCallback.order + 1
    _stateattrs = ("last_saved_path", "saved")

    def __init__(
        self,
        monitor: str = "valid_loss",
        comp: Callable[[Any, Any], Any] | None = None,
        min_delta: float = 0.0,
        fname: str = "model",
        every_epoch: bool | int = False,  # save every so many epochs as `fname_<epoch>`, whatever their value
        at_end: bool = False,  # the last weights take the place of the best ones, and nothing is loaded
        with_opt: bool = False,  # the optimizer's state too
        reset_on_fit: bool = True,
        *,
        every_step: int = 0,  # save every so many updates as `fname_step<updates>`
        top_k: int = 1,  # keep so many of the best as `fname_<epoch>`, and load the very best
    ):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        _check_times(every_epoch=every_epoch, every_step=every_step, at_end=at_end, top_k=top_k > 1)
        if top_k < 1:
            raise ValueError(f"`top_k={top_k}`: keep one file at least; without this callback none is saved.")
        self.fname, self.every_epoch, self.at_end, self.with_opt = fname, every_epoch, at_end, with_opt
        self.every_step, self.top_k = every_step, top_k
        self.last_saved_path: Path | None = None  # of this fit; set once the file is written
        self.saved: list[Any] = []  # [value, name, path] of the best files, best first
        self._stamps: dict[str, Any] = {}  # by name: what a file looked like once it was written

    def before_fit(self) -> None:
        self._check_alone()
        self.last_saved_path = None
        if self.reset_on_fit:
            self.saved = []
        if self._saves_the_best():
            super().before_fit()
        elif self.best is None:
            self.best = self._worst

    def _saves_the_best(self) -> bool:
        return not self.every_epoch and not self.every_step

    def _name(self, epoch: Any, n_updates: Any) -> str:
        if self.every_step:
            return f"{self.fname}_step{n_updates}"
        return f"{self.fname}_{epoch}" if self.every_epoch or self.top_k > 1 else self.fname

    def _check_alone(self) -> None:
        name = self._name("<epoch>", "<updates>")
        others = [cb for cb in self.learn._grab_cbs(SaveModelCallback) if cb is not self]
        if name in [other._name("<epoch>", "<updates>") for other in others]:
            raise ValueError(
                f"two SaveModelCallbacks write to `{name}`, and each would load what the other saved. "
                "Give one of them another `fname`."
            )

    def after_step(self) -> None:
        learn = self.learn
        if self.every_step and learn.stepped and learn.opt_iter % self.every_step == 0:
            self._save()

    def after_epoch(self) -> None:
        if self.every_epoch and self.learn.epoch % self.every_epoch == 0:
            self._save_scored()
        if self._saves_the_best():
            super().after_epoch()
            self._save_if_good()

    def _save(self) -> str:
        name = self._name(self.learn.epoch, self.learn.opt_iter)
        self.last_saved_path = Path(self.learn.save(name, with_opt=self.with_opt))
        self._stamps[name] = _stamp(self.last_saved_path)
        return name

    def _save_scored(self) -> str:
        with scored_weights(self.learn):  # averages, where the validation saw those
            return self._save()

    def _save_if_good(self) -> None:
        """Saves this epoch's weights if they are among the best `top_k`, and lets the worst file go."""
        value = self._value()
        if self.new_best:
            self._say(f"Better model found at epoch {self.learn.epoch} with {self.monitor} value: {self.best}.")
        elif self.top_k == 1 or not self._is_among_best(value):
            return
        name = self._save_scored()
        others = [entry for entry in self.saved if entry[1] != name]
        place = 0 if self.new_best else sum(not is_better(value, other[0], self.comp) for other in others)
        others.insert(place, [value, name, str(self.last_saved_path)])
        self.saved, left = others[: self.top_k], others[self.top_k :]
        for entry in left:
            self._delete(*entry[1:])

    def _is_among_best(self, value: Any) -> bool:
        worst = self.saved[-1][0] if len(self.saved) >= self.top_k else self._worst
        return is_better(value, worst, self.comp)

    def _delete(self, name: str, path: str) -> None:
        if self._is_own(name, path):
            Path(path).unlink(missing_ok=True)
        self._stamps.pop(name, None)

    def _is_own(self, name: str, path: str) -> bool:
        """Whether the file of that name is still the one that was written, or found by a resumed fit."""
        stamp = self._stamps.get(name)
        return stamp is not None and stamp == _stamp(path)

    def after_fit(self) -> None:
        """Loads the best weights, or saves the last ones; not after Ctrl-C, so that a resume goes on with its own."""
        if self.learn.interrupted:
            return
        if self.at_end:
            self._save_scored()
        elif self._saves_the_best() and self.saved:
            self._load(*self.saved[0][1:])

    def _load(self, name: str, path: str) -> None:
        if self._is_own(name, path):
            self.learn.load(name, with_opt=self.with_opt)
            return
        warnings.warn(
            f"`{path}` is not the file that SaveModelCallback wrote any more, so the best weights were not loaded; the "
            "model has those of the last epoch.",
            stacklevel=2,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._stamps = {name: _stamp(path) for _, name, path in self.saved}


def _check_times(**times: Any) -> None:
    chosen = [f"`{name}`" for name, is_chosen in times.items() if is_chosen]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} name different times to save; pass one of them.")


def _stamp(path: str | Path) -> tuple[int, int] | None:
    """What changes whenever a file is written anew; None where there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
