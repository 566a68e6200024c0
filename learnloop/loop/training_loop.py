"""The loop: fit, epoch, batch, step, in that order. What it leans on lies in the rooms beside it."""

import math
from collections.abc import Callable
from typing import Any

import torch

from learnloop.data.batches import pick_pred
from learnloop.data.loaders import due_after, name_of, number_of
from learnloop.loop.cancel import CancelBackwardException, CancelStepException
from learnloop.loop.current import CurrentBatch
from learnloop.loop.dispatch import TABLES
from learnloop.loop.fits import (
    FitCall,
    arrive,
    do_what_is_due,
    first_batch,
    position,
    resumes_at,
    stop_if_asked,
)
from learnloop.loop.kept import Kept
from learnloop.loop.passes import Passes, check_not_empty, opened, sample_numbers, warn_without_targets
from learnloop.loop.spans import BACKWARD, BATCH, EPOCH, STEP, TRAIN, VALIDATE, end_unheard, run_innermost, run_span
from learnloop.loop.state import check_callback_states

#: What a learner keeps of the run that goes on, and what another one begins without.
OF_A_RUN = (
    *("dl", "dl_name", "batch", "xb", "yb", "pred", "_raw_loss", "_loss", "_loss_grad", "_last_loss", "_output_loss"),
    *("_device", "_moves", "_caller", "_n_inp", "_rated", "_passes", "_resuming", "_validation_start", "_pass_random"),
    *("_stage", "interrupted", "_stop_requested", "_stop_late", "_forward", "_backward"),
)


class TrainingLoop(CurrentBatch):
    """Trains `model` on `dls.train` and validates it on `dls.valid` and further named sets, event by event.

    What it keeps on itself is annotated with unit and lifetime; callbacks read all of it and may write most.
    """

    opt: Any = None  # the optimizer; None before the first fit

    n_epoch: int = 1  # epochs of this fit
    n_step: int | None = None  # updates of this fit, where `fit(n_step=…)` counts those
    valid_every: int = 0  # updates per epoch of `fit(n_step=…)`
    epoch: int = 0  # number within this fit, from 0; kept after it
    train_iter: int = 0  # training batches done in this fit, cancelled ones included
    opt_iter: int = 0  # updates done in this fit: steps that ended normally
    stepped: bool = False  # whether this batch made an update
    pct_train: float = 0.0  # part of this fit's training that is done, 0 to 1
    interrupted: bool = False  # Ctrl-C is ending this fit
    final_record: Any  # the last row of numbers, set by the Recorder; absent before the first

    _rated: tuple[Any, Any] = (None, {"lr": 0.0})  # the optimizer, and its dict from which rates are recorded
    _kept: Kept  # losses and rates of this fit
    _call: FitCall | None = None  # the arguments of a fit that Ctrl-C stopped, for `resume()`
    _point: dict[str, Any] | None = None  # the state that `resume()` goes on from
    _is_done: bool = False  # the last fit has come to its end, by a cancel or without
    _no_point: Exception | None = None  # why that could not be taken
    _resuming: dict[str, Any] | None = None  # the same, until the resumed fit has come to where it was taken
    _stage: tuple[str, int] = ("fit", 0)  # the last place from which a fit can go on, and its epoch
    _first_epoch: int = 0
    _batches_done: int = 0  # in this training phase
    _progress: tuple[float, float] = (0.0, 1.0)  # what a batch adds to `pct_train`, and its end in this epoch
    _identity: dict[str, Any] | None = None  # what this fit is made of, and a resumed one must be made of
    _data_seed: int = 0  # of the data's order and augmentation in this fit
    _at_most: int | None = None  # batches of a phase that a dry run sees; None: all
    _is_plain: bool = False  # its class has the steps of a batch that are written here
    _passes: Passes | None = None  # the loader's passes of `fit(n_step=…)`
    _pass_random: dict[str, Any] | None = None  # where the global generators stood when an unkeyed pass began
    _validation_start: dict[str, Any] | None = None  # what a stop in this validation goes back to
    _depth: int  # runs nested in the active one
    _seeds_drawn: int = 0  # in a run beside the training, which moves the global stream by so many draws at its end
    _stop_requested = _stop_late = False  # Ctrl-C was pressed; pressed again during a cleanup
    _waits: list[tuple[Any, ...]]  # how long some batches of each epoch of this fit were waited for; see `passes.waits`
    _due: list[Callable[[], Any]]  # what waits for a place from which a fit can go on

    def __init__(self) -> None:
        self._kept, self._depth, self._due, self._waits = Kept(), 0, [], []
        super().__init__()

    def _do_fit(self) -> None:
        check_callback_states(self)
        arrive(self, "fit", self._first_epoch)
        for self.epoch in range(self._first_epoch, self.n_epoch):  # noqa: B020
            run_span(self, EPOCH, self._do_epoch)
            arrive(self, "fit", self.epoch + 1)

    def _do_epoch(self) -> None:
        arrive(self, "epoch", self.epoch)
        if not resumes_at(self, "validate"):
            self._do_epoch_train()
        arrive(self, "validate", self.epoch)
        for ds_idx in due_after(self.dls, self.epoch, self.n_epoch):
            self._do_epoch_validate(ds_idx)

    def _do_epoch_train(self) -> None:
        self._begin_phase(self._loader(0), training=True)
        self.dl_name = "train"
        self.pct_train = self.epoch / self.n_epoch if self.n_step is None else self.opt_iter / self.n_step
        run_span(self, TRAIN, self.all_batches)

    def _do_epoch_validate(self, ds_idx: int | str = 1, dl: Any = None) -> None:
        self._begin_phase(self._loader(ds_idx) if dl is None else dl, training=False)
        self.dl_name = name_of(self.dls, ds_idx) if dl is None else None
        with torch.no_grad():
            run_span(self, VALIDATE, self.all_batches)

    def all_batches(self) -> None:
        """Trains or evaluates the model on all batches of `dl`."""
        self._begin_phase(self.dl, self.training)
        self._is_plain = all(getattr(type(self), name) is step for name, step in _STEPS.items())
        start = first_batch(self) if self.training else 0
        with opened(self, start) as stream:
            if self.training:
                arrive(self, "train", self.epoch)
                self._progress = 1.0 / ((self.n_iter or math.inf) * self.n_epoch), (self.epoch + 1) / self.n_epoch
            i = None
            for i, self.batch in enumerate(stream, start):
                self.one_batch(i, self.batch)
        if i is None and start == 0:
            check_not_empty(self)
        warn_without_targets(self)

    def one_batch(self, i: int, batch: Any) -> None:
        """Trains or evaluates the model on one batch, number `i` of its phase."""
        self.iter, self.stepped = i, False
        self._split(batch)
        del batch  # a traceback keeps this frame
        run_span(self, BATCH, self._do_one_batch, self._count)
        if self._due:
            do_what_is_due(self)
        self.batch = None

    def _do_one_batch(self) -> None:
        """Prediction, loss and update: `_do_steps`, written out where no step was replaced, as calls cost the most."""
        is_plain = self._is_plain and self.__dict__.keys().isdisjoint(_STEPS)
        if not is_plain or not self.xb or not isinstance(self.xb[0], torch.Tensor):
            return self._do_steps()
        self.pred = self.model(*self.xb)  # no local names: a traceback would keep them
        if not isinstance(self.pred, (torch.Tensor, tuple)):
            self.pred = self._picked(self.pred, False)
        if "after_pred" not in self._silent:
            self("after_pred")
        if not isinstance(self.pred, (torch.Tensor, tuple)):
            self.pred = pick_pred(self.pred)
        if self._output_loss is None and self.loss_func is not None:
            if len(self.yb):
                self._raw_loss = self.loss_func(self.pred, *self.yb)
        elif self._has_loss():
            self._compute_loss()
        if "after_loss" not in self._silent:
            self("after_loss")
        if not self.training or not (len(self.yb) or self._output_loss is not None):
            return None
        if self._loss_grad is not None or not getattr(self._raw_loss, "requires_grad", False) or self._raw_loss.ndim:
            return self._do_grad_opt()  # a callback's loss, an error, or nothing to train
        silent = self._silent
        if "backward" in silent:
            try:
                self._raw_loss.backward()
            except CancelBackwardException:
                pass
            if self._silent is not silent:  # somebody came meanwhile, and hears the rest
                end_unheard(self, BACKWARD)
        else:
            run_span(self, BACKWARD, self._backward)
        silent = self._silent
        if "step" in silent:
            try:
                self.opt.step()
                self.opt_iter += 1
                self.stepped = True
            except CancelStepException:
                pass
            if self._silent is not silent:
                end_unheard(self, STEP)
        else:
            run_span(self, STEP, self._step)
        return self.opt.zero_grad()

    def _do_steps(self) -> None:
        self._forward()
        if self.training and self._has_loss():
            self._do_grad_opt()

    def _has_loss(self) -> bool:
        return bool(len(self.yb)) or self._output_loss is not None  # a callback may have filled yb

    def _forward(self) -> None:
        self._predict()
        self("after_pred")
        if not isinstance(self.pred, (torch.Tensor, tuple)):
            self.pred = pick_pred(self.pred)
        if self._has_loss():
            self._compute_loss()
        self("after_loss")

    def _do_grad_opt(self) -> None:
        if self._has_no_graph() and self._has_nothing_to_train():
            return
        run_innermost(self, BACKWARD, self._backward)
        run_innermost(self, STEP, self._step)
        self.opt.zero_grad()  # after the step, not before backward: accumulation leaves gradients on purpose

    def _backward(self) -> None:
        loss = self._raw_loss if self._loss_grad is None else self._loss_grad
        if getattr(loss, "ndim", 1) or not loss.requires_grad:
            loss = self._checked(loss)
        loss.backward()

    def _step(self) -> None:
        self.opt.step()
        self.opt_iter += 1
        self.stepped = True

    def _count(self) -> None:
        """What every batch moves, a cancelled one too: the kept losses and rates, the counters, the progress."""
        loss = self._raw_loss if self._loss is None else self._loss  # which a callback may have set to no tensor
        if loss is not None:
            self._last_loss = loss = loss.detach() if getattr(loss, "requires_grad", False) else loss
        if not self.training:
            return
        if loss is not None:
            opt, group = self._rated
            if self.opt is not opt:
                opt, group = self._rated = self.opt, self.opt.last_group()
            kept = self._kept
            kept.losses.append(loss)
            kept.rates.append(group["lr"])
            if len(kept.losses) >= kept.room:
                kept.make_room(self.pred)
        self.train_iter += 1
        self._batches_done = self.iter + 1  # type: ignore[operator]
        if self._passes is not None:
            self._passes.mark()
            self.pct_train = min(1.0, self.opt_iter / self.n_step)  # type: ignore[operator]
        else:
            share, end = self._progress  # a loader may have more batches than it says
            pct = self.pct_train + share
            self.pct_train = pct if pct < end else end

    def at_boundary(self, action: Callable[[], Any]) -> None:
        """Calls `action()` where the fit could go on from next: after this training batch, or after this epoch."""
        self._due.append(action)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is outside of every run: taken inside of one, it is without its batch, graph, loader and handlers."""
        state = {name: value for name, value in vars(self).items() if name not in TABLES}
        if self.task is None:
            return state
        outside: dict[str, Any] = {
            "task": None,
            "training": False,
            "_depth": 0,
            "_muted": [],
            "_open_spans": [],
            "_due": [],
        }
        return {**{name: value for name, value in state.items() if name not in OF_A_RUN}, **outside}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._rebuild()

    def _loader(self, ds_idx: int | str) -> Any:
        """A loader by its number or name; None for a validation loader that is not there."""
        ds_idx = number_of(self.dls, ds_idx)
        if hasattr(self.dls, "__getitem__"):
            return None if ds_idx == 1 and len(self.dls) < 2 else self.dls[ds_idx]
        return (self.dls.train, getattr(self.dls, "valid", None))[ds_idx]

    def _stop_here(self) -> None:
        stop_if_asked(self)

    def _sample_numbers(self, ahead: int) -> Any:
        return sample_numbers(self, ahead)

    def _position(self) -> dict[str, Any]:
        return position(self)

    def _release(self) -> None:
        """Lets go of everything that a run held: loader, batch, graph, passes, states taken on the way."""
        self._release_batch()
        self._rated = type(self)._rated
        self._resuming = self._validation_start = self._pass_random = None
        self._due = []
        if self._passes is not None:
            self._passes.close()
            self._passes = None

    _end_cleanup = _release  # the name by which fastai's callbacks know it


#: The steps of a batch that a subclass, or something on a learner, may replace.
_STEPS = {
    name: getattr(TrainingLoop, name)
    for name in ("_forward", "_predict", "_compute_loss", "_do_grad_opt", "_backward", "_step")
}
