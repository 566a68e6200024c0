"""One fit from its arguments to its end: checked, begun, stopped by Ctrl-C, gone on with where it was stopped."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fastcore.basics import noop

from learnloop.data.keyed import draw_seed, length
from learnloop.data.loaders import names_of, title_of
from learnloop.loop.cancel import CancelFitException
from learnloop.loop.dispatch import instances
from learnloop.loop.identity import check_same_fit, identity
from learnloop.loop.interrupt import StopButton, stopped
from learnloop.loop.kept import Kept
from learnloop.loop.passes import Passes, loader_state
from learnloop.loop.runs import run_outermost, run_undone
from learnloop.loop.spans import EPOCH, FIT, run_span
from learnloop.loop.state import capture, capture_moving, check_callback_states, restore, unplain


@dataclass(frozen=True)
class FitCall:
    """The arguments of a fit. `check` refuses wrong ones before anything is touched."""

    n_epoch: int | None
    lr: Any = None
    wd: Any = None
    cbs: Any = None
    reset_opt: bool = False
    start_epoch: int = 0
    n_step: int | None = None
    valid_every: int | None = None
    repeats: bool = False  # the fit of another process, which must have been the same

    def checked(self, learn: Any, verb: str = "fit") -> "FitCall":
        """The call with its callbacks made, so that a resume adds the same instances."""
        if learn.task is not None:
            raise RuntimeError(
                f"`{verb}` was called while a run is active, which it would overwrite. Call it after that run."
            )
        if (self.n_epoch is None) == (self.n_step is None):
            raise ValueError("pass either `fit(n_epoch)` or `fit(n_step=…, valid_every=…)`.")
        for name in ("n_epoch", "start_epoch", "n_step", "valid_every"):
            _check_count(name, getattr(self, name), least=1 if name in ("n_step", "valid_every") else 0)
        if self.valid_every is not None and self.n_step is None:
            raise ValueError("`valid_every` goes with `n_step`; `fit(n_epoch)` validates every epoch.")
        _check_loaders(learn)
        return replace(self, cbs=instances(self.cbs))

    @property
    def epochs(self) -> int:
        """How many epochs this fit has; with `n_step`, the stretches between two validations."""
        return self.n_epoch or 0 if self.n_step is None else -(-self.n_step // self.stretch)

    @property
    def stretch(self) -> int:
        """Updates from one validation to the next."""
        return self.valid_every or self.n_step or 0


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}={value!r}`: pass a whole number.")
    if value < least:
        raise ValueError(f"`{name}={value}`: pass {least} or more.")


def _check_loaders(learn: Any) -> None:
    for ds_idx, name in enumerate(names_of(learn.dls)):
        dl = None if name is None else learn._loader(ds_idx)
        if dl is not None and length(dl) == 0:
            raise ValueError(
                f"{title_of(name)} is empty: {type(dl).__name__} has 0 batches. Check its data, and "
                "`drop_last` with a batch size above the number of samples."
            )


def run_fit(learn: Any, call: FitCall, resume: dict[str, Any] | None = None) -> None:
    """A fit, new or from the state where it was stopped, with Ctrl-C as its stop button."""
    with StopButton(learn) as button:
        try:
            run_outermost(learn, "fit", call.cbs, partial(_fit, learn, call, resume))
            learn._is_done = not learn.interrupted
        finally:  # an error may leave a point to go on from too
            learn._call = call if learn._point is not None else None
    if button.was_pressed:
        raise _interrupt(learn)


def _fit(learn: Any, call: FitCall, resume: dict[str, Any] | None) -> None:
    learn._prepare_opt(call, resume is not None)
    if call.repeats and resume is not None:
        check_same_fit(learn, call, resume)
    learn._identity = identity(learn, call) if resume is None else resume["identity"]
    learn._point, learn._no_point, learn._resuming, learn._validation_start = resume, None, resume, None
    learn._is_done = False
    _begin(learn, call)
    if resume is not None:
        learn._first_epoch = resume["position"]["epoch"]
        learn._data_seed, learn._pass_random = resume["counters"]["_data_seed"], unplain(resume["pass_random"])
    learn.epoch = min(learn._first_epoch, max(0, learn.n_epoch - 1))
    run_span(learn, FIT, partial(_stoppable, learn))


def _begin(learn: Any, call: FitCall) -> None:
    """Every count from its start, and a seed for the data."""
    learn._kept, learn._last_loss, learn._first_epoch = Kept(), torch.tensor(0.0), call.start_epoch
    learn.n_epoch, learn.n_step, learn.valid_every = call.epochs, call.n_step, call.stretch
    learn.train_iter = learn.opt_iter = learn._batches_done = 0
    learn.pct_train, learn.training, learn.iter, learn._waits = 0.0, False, None, []
    learn._data_seed, learn._pass_random = draw_seed(), None


def run_trial(
    learn: Any,
    task: str,
    call: FitCall,
    dl: Any = None,  # what it trains on; None: the training loader
    then: Callable[[], Any] = noop,  # called after the training, with its weights in place
) -> Any:
    """Trains for `call.n_step` updates without validation, and undoes all of it; returns the losses and rates it kept.

    A learner without an optimizer gets one, as from a fit.
    """
    if learn.opt is None:
        learn.create_opt()
    return run_undone(learn, task, call.cbs, partial(_trial, learn, call, dl, then))


def _trial(learn: Any, call: FitCall, dl: Any, then: Callable[[], Any]) -> None:
    learn._prepare_opt(call, False)
    _begin(learn, call)
    learn.epoch, learn._passes = 0, Passes(learn, learn._loader(0) if dl is None else dl)

    def epoch() -> None:
        learn._do_epoch_train()
        then()

    run_span(learn, FIT, partial(run_span, learn, EPOCH, epoch))


def run_dry(learn: Any, call: FitCall, n_batch: int, reassemble: Callable[[], Any]) -> None:
    """The first and the last epoch of a fit with `n_batch` batches in each phase, undone as `run_undone` does it."""
    run_undone(learn, "fit", call.cbs, partial(_dry, learn, call, n_batch), reassemble)


def _dry(learn: Any, call: FitCall, n_batch: int) -> None:
    learn._prepare_opt(call, False)
    _begin(learn, call)
    learn._at_most, learn.epoch = n_batch, min(call.start_epoch, max(0, learn.n_epoch - 1))
    if learn.n_step is not None:
        learn._passes = Passes(learn, learn._loader(0))
    run_span(learn, FIT, partial(_first_and_last, learn))


def _first_and_last(learn: Any) -> None:
    check_callback_states(learn)
    for learn.epoch in sorted({learn._first_epoch, learn.n_epoch - 1}):  # noqa: B020
        if learn._first_epoch <= learn.epoch < learn.n_epoch:
            run_span(learn, EPOCH, learn._do_epoch)


def _stoppable(learn: Any) -> None:
    """The fit's body; where Ctrl-C ended it, the state is taken once the inner spans are closed, before `after_fit`."""
    if learn.n_step is not None:
        where = learn._resuming["position"] if learn._resuming else {"pass": 0, "taken": 0}
        learn._passes = Passes(learn, learn._loader(0), where["pass"], where["taken"])
    try:
        learn._do_fit()
        stop_if_asked(learn)
    except CancelFitException:
        if learn.interrupted and learn._stage[0] != "train":
            _take_point(learn)
        raise


# The places from which a fit can go on


def arrive(learn: Any, stage: str, epoch: int) -> None:
    """Notes such a place, and loads the state of a resumed fit where it was taken at this one."""
    if learn.task != "fit":
        return
    learn._stage = (stage, epoch)
    if resumes_at(learn, stage):
        restore(learn, learn._resuming)
        learn._resuming = learn._point = None
    learn._validation_start = capture_moving(learn) if stage == "validate" else None
    if stage == "fit" and learn._due:
        do_what_is_due(learn)


def do_what_is_due(learn: Any) -> None:
    """What asked for a place from which the fit can go on; in training and between epochs, not in nested runs."""
    if learn.task == "fit" and learn._stage[0] in ("train", "fit") and not _has_drawn_batch(learn):
        due, learn._due = learn._due, []
        for action in due:
            action()


def resumes_at(learn: Any, stage: str) -> bool:
    """Whether a resumed fit has still to come to the place where it was stopped, and that is `stage`."""
    return learn._resuming is not None and learn._resuming["position"]["stage"] == stage


def first_batch(learn: Any) -> int:
    """The batch at which a training phase begins: 0, or where a resumed fit was stopped in it."""
    learn._batches_done = learn._resuming["position"]["batches"] if resumes_at(learn, "train") else 0
    return learn._batches_done


def position(learn: Any) -> dict[str, Any]:
    """The place that was noted last, and what was done since."""
    stage, epoch = learn._stage
    number, taken = learn._passes.used if learn._passes is not None else (0, 0)
    done = learn._batches_done if stage == "train" else 0
    own = loader_state(learn) if stage == "train" else None
    return {"stage": stage, "epoch": epoch, "batches": done, "pass": number, "taken": taken, "loader": own}


def stop_if_asked(learn: Any) -> None:
    """Ends a fit after Ctrl-C, at a place from which it can go on exactly; runs nested in it are not cut."""
    if not learn._stop_requested or learn.task != "fit" or _has_drawn_batch(learn):
        return
    learn.interrupted = True
    if learn._stage[0] == "train":
        _take_point(learn)  # before the cleanups of train: they drop an open accumulation window
    raise CancelFitException


def _has_drawn_batch(learn: Any) -> bool:
    """Whether a batch is in hand that a loader drew from the global generators: read again, it would be another."""
    in_hand = learn._stage[0] == "train" and learn.batch is not None and learn.iter == learn._batches_done
    return learn._pass_random is not None and in_hand


def _take_point(learn: Any) -> None:
    """Takes the state to resume from; a resumed fit that has not loaded its own yet keeps that one."""
    if learn._resuming is not None:
        return
    try:
        learn._point = capture(learn)
    except Exception as error:  # such as a callback's state that cannot be stored: the fit ends all the same
        learn._no_point = error


def _interrupt(learn: Any) -> KeyboardInterrupt:
    """What leaves a fit that Ctrl-C has ended: where it stopped, and whether it can go on."""
    if not learn.interrupted:
        return stopped("when the fit was ending already", "There is nothing left to go on with.")
    if learn._point is not None:
        return stopped(_where(learn), "`learn.resume()` goes on from there.")
    reason = f", because {learn._no_point}" if learn._no_point is not None else ": fit again."
    return stopped(_where(learn), f"It cannot go on exactly from there{reason}")


def _where(learn: Any) -> str:
    stage, epoch = learn._stage
    if stage == "train":
        return f"before batch {learn._batches_done} of epoch {epoch}"
    return f"in the validation of epoch {epoch}" if stage == "validate" else f"before epoch {epoch}"
