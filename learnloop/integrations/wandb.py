"""Weights & Biases: a run per learner, online or offline."""

from typing import Any

from learnloop.callbacks.reports import Reports, description, numbers_of_row
from learnloop.integrations.packages import imported

__all__ = ["WandbCallback"]


class WandbCallback(Reports):
    """Logs losses, hypers and metrics of a fit to a run of W&B: `WandbCallback(project="digits", mode="offline")`.

    A run that you began yourself by `wandb.init` is used and left open. Without one the callback begins its own, with
    the arguments given here, and finishes it with the fit, whatever ended that; a later or a resumed fit goes on with
    the run of that id. It acts in `before_fit`, `after_batch`, `after_epoch` and `cleanup_fit`.
    Source: docs.fast.ai/callback.wandb. Cost per batch: some 550 µs every `every` batches, in which it waits for the
    loss; 0.1 s to begin and to finish a run of its own.
    """

    _stateattrs = ("run_id",)

    def __init__(
        self,
        log: str | None = None,  # 'gradients', 'parameters' or 'all': their histograms too, as `wandb.watch` makes them
        every: int | None = 10,  # training batches from one report to the next; None: rows only
        **init: Any,  # of `wandb.init`: project name mode dir tags …
    ):
        super().__init__(every)
        self.log, self.init = log, init
        self.run_id: str | None = None  # of the callback's own run
        self._is_own = False

    def begin(self) -> Any:
        wandb = imported("wandb", "WandbCallback", "wandb")
        self._is_own = wandb.run is None
        run = wandb.run
        if run is None:
            again = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
            run = wandb.init(**{**self.init, **again})
            self.run_id = run.id
        self.n_before = max(self.n_before, run.step)  # W&B drops what comes for an earlier step
        run.config.update(description(self.learn), allow_val_change=True)
        if self.log is not None:
            run.watch(self.learn.model, log=self.log)
        return run

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        self.target.log(numbers, step=step)

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        self.target.log(numbers_of_row(row), step=step)

    def end(self, how: str) -> None:
        if self.log is not None:
            self.target.unwatch(self.learn.model)
        if self._is_own:
            self.target.finish(exit_code=0 if how in ("done", "removed") else 1)
