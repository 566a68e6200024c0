"""Optuna: trials that look bad are ended early."""

import warnings
from typing import Any

from learnloop.callbacks.trackers import TrackerCallback, smaller_is_better
from learnloop.integrations.packages import imported
from learnloop.loop.cancel import CancelFitException

__all__ = ["OptunaPruning"]


class OptunaPruning(TrackerCallback):
    """Reports a column of the record to a trial of Optuna after each epoch, and ends the fit where that prunes it.

    The fit ends by `CancelFitException`, in order, with everybody's `after_fit`; then `optuna.TrialPruned` leaves it,
    which a study knows how to take. Several fits of one callback, as in `fine_tune`, are steps of one trial. It acts in
    `before_fit`, `after_epoch` and `cleanup_fit`. Source: optuna.readthedocs.io, Trial.report. Cost per batch: none.
    """

    order = TrackerCallback.order + 3
    _stateattrs = ("n_reported",)

    def __init__(
        self,
        trial: Any,  # of the objective
        monitor: str = "valid_loss",  # the column; what the study wants, smaller or larger, should fit it
    ):
        super().__init__(monitor)
        self.trial = trial
        self.n_reported = 0  # epochs with a value, over all fits
        self._is_pruned = False

    def before_fit(self) -> None:
        super().before_fit()
        self._is_pruned = False
        wanted = "minimize" if smaller_is_better(self.monitor) else "maximize"
        direction = self.trial.study.direction.name.lower()
        if direction != wanted:
            warnings.warn(
                f"the study is to {direction}, and by its name `{self.monitor}` is to be {wanted}d: the best "
                f'trials would be pruned. Pass `monitor=…`, or `optuna.create_study(direction="{wanted}")`.',
                stacklevel=2,
            )

    def after_epoch(self) -> None:
        super().after_epoch()
        value = self._value()
        if value is None:
            return
        self.trial.report(float(value), self.n_reported)
        self.n_reported += 1
        if self.trial.should_prune():
            self._is_pruned = True
            raise CancelFitException

    def cleanup_fit(self) -> None:
        pruned, self._is_pruned = self._is_pruned, False
        if pruned:
            optuna = imported("optuna", "OptunaPruning", "optuna")
            raise optuna.TrialPruned(f"pruned after {self.n_reported} epochs, at {self.monitor} {self._last()}")

    def _last(self) -> str:
        value = self._value()
        return "?" if value is None else f"{value:.4g}"
