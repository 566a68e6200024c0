"""Reporting a training while it goes on: numbers every so many batches, a row per epoch, and how it ended."""

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from learnloop.callbacks.recorder import Recorder
from learnloop.data.keyed import preserved_randomness
from learnloop.loop.callback import Callback
from learnloop.machine import rank_distrib

__all__ = ["Reports", "description", "how_it_ended", "is_number", "numbers_of_row"]


class Reports(Callback):
    """Hands the numbers of a training to `write_step` and `write_row`, between `begin` and `end`: a subclass fills in.

    Several fits of one callback are one run: their steps, which count training batches, go on. Where processes train
    together only the first one reports. What cannot be written warns once, and the training goes on without it.
    It acts in `before_fit`, `after_batch` of every `every` training batches, `after_epoch` and `cleanup_fit`; each
    report of a batch waits for its loss.
    """

    order, run_after, run_valid = Recorder.order + 1, Recorder, False
    tasks = ("fit",)
    reads_only = acts_outside = True
    _stateattrs: tuple[str, ...] = ("n_before", "n_rows")

    def __init__(self, every: int | None = 10):
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every={every!r}`: pass a number of batches, 1 or more, or None for none of them.")
        self.every, self.run_train = every, every is not None  # without it there is nothing to do in a batch
        self.n_before = 0  # training batches of earlier fits
        self.n_rows = 0  # rows of this fit that were written
        self.target: Any = None  # what `begin` opened; None outside of a fit
        self._is_open = False
        self._outer: int | None = None  # the id of an exception that was being handled when the fit began

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing open."""
        return {**vars(self), "target": None, "_is_open": False}

    # What a subclass fills in; all of them may raise

    def begin(self) -> Any:
        """Opens what is written to; that is `target` until the fit has ended."""

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        """Takes the numbers of a training batch: the losses and the hypers of each group."""

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        """Takes a row of the record by column; a column that has no number is None."""

    def end(self, how: str) -> None:
        """Closes what was opened. `how` is 'done', 'interrupted', 'error' or 'removed'."""

    # The events

    def before_fit(self) -> None:
        """Opens what is written to, once per fit; an error in that is the user's to see."""
        self._outer, self.n_rows = id(sys.exception()), 0
        if rank_distrib() == 0:
            with preserved_randomness():  # trackers make up names
                self.target = self.begin()
            self._is_open = True

    def after_batch(self) -> None:
        learn = self.learn
        if self.every is not None and self._is_open and learn.train_iter % self.every == 0:
            self._try(lambda: self.write_step(self.n_before + learn.train_iter, numbers_of_batch(learn)))

    def after_epoch(self) -> None:
        """Writes the rows that are new, which may be earlier ones where a resume has added this callback."""
        recorder = self.learn.__dict__.get("recorder")
        if recorder is None or not self._is_open:
            return
        for row, n_done in list(zip(recorder.history, recorder.iters, strict=True))[self.n_rows :]:
            self._try(lambda row=row, n_done=n_done: self.write_row(self.n_before + n_done, row))  # type: ignore[misc]
            self.n_rows += 1

    def cleanup_fit(self) -> None:
        if self._is_open:
            self._is_open = False
            self._try(lambda: self.end(how_it_ended(self.learn, self._outer)))
        self.n_before += self.learn.train_iter
        self.target = self._outer = None

    def _try(self, write: Callable[[], Any]) -> None:
        """Writes; a full disk or a server that is gone must not end a training."""
        try:
            write()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        was_open, self._is_open = self._is_open, False
        with suppress(Exception):  # what kept it from writing may keep it from closing
            if was_open:
                self.end("error")
        self.target = None
        warnings.warn(f"`{self}` stopped reporting: {type(error).__name__}: {error}", stacklevel=3)


def numbers_of_batch(learn: Any) -> dict[str, float]:
    """What a training batch has to report: epochs done, losses, and the hypers of each group as `lr_0`, `mom_0`."""
    numbers: dict[str, float] = {"epoch": round(learn.pct_train * learn.n_epoch, 6)}
    n_losses = len(learn._kept)
    if n_losses:
        smooth = learn.__dict__["recorder"].smooth_loss.value if "recorder" in learn.__dict__ else None
        numbers |= {} if smooth is None else {"train_loss": float(smooth)}
        numbers["raw_loss"] = learn._kept.since(n_losses - 1)[0]
    for i, hypers in enumerate(learn.opt.hypers):
        numbers |= {f"{name}_{i}": value for name, value in hypers.items() if is_number(value)}
    return numbers


def is_number(value: Any) -> bool:
    """Whether a tracker can draw it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers_of_row(row: Mapping[str, Any]) -> dict[str, float]:
    """The columns of a row that a tracker draws; the training loss it has from the batches."""
    others = ("epoch", "train_loss", "time")
    return {name: value for name, value in row.items() if name not in others and is_number(value)}


def description(learn: Any) -> dict[str, Any]:
    """A fit in plain words and numbers: what is trained, on how much, with what."""
    model, opt = learn.model, getattr(learn.opt, "opt", learn.opt)
    n_params = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
    loss_func = learn.loss_func
    return {
        "model": type(model).__name__,
        "n_params": n_params,
        "loss_func": getattr(loss_func, "__name__", type(loss_func).__name__),
        "opt": type(opt).__name__,
        "lr": [hypers.get("lr") for hypers in learn.opt.hypers],
        "n_epoch": learn.n_epoch,
        "n_step": learn.n_step,
        "batch_size": getattr(learn.dls, "bs", None),
        "device": str(getattr(learn.dls, "device", None)),
        "callbacks": [type(cb).__name__ for cb in learn.cbs],
    }


def how_it_ended(learn: Any, outer: int | None = None) -> str:
    """Of a fit in its `cleanup_fit`: 'done', 'interrupted' or 'error'; 'removed' where the callback leaves it early.

    `outer` is the id of the exception that was being handled when the fit began, which is none of its own.
    """
    error = sys.exception()
    if len(learn._open_spans) > 1:
        return "removed"
    if learn.interrupted or (isinstance(error, KeyboardInterrupt) and id(error) != outer):
        return "interrupted"
    return "done" if error is None or id(error) == outer else "error"
