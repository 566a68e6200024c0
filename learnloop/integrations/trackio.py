"""Trackio: a run per learner in a local database, which `trackio show` draws."""

from typing import Any

from learnloop.callbacks.reports import Reports, description, numbers_of_row
from learnloop.integrations.packages import imported

__all__ = ["TrackioCallback"]


class TrackioCallback(Reports):
    """Logs losses, hypers and metrics of a fit to a run of Trackio: `TrackioCallback("digits")`.

    A run that you began yourself by `trackio.init` is used and left open. Without one the callback begins its own, with
    the arguments given here, and finishes it with the fit, whatever ended that; a later or a resumed fit goes on with
    the run of that name. It acts in `before_fit`, `after_batch`, `after_epoch` and `cleanup_fit`.
    Source: huggingface.co/docs/trackio. Cost per batch: some 170 µs every `every` batches, in which it waits for
    the loss.
    """

    _stateattrs = ("run_name",)

    def __init__(
        self,
        project: str = "learnloop",
        name: str | None = None,  # of the run; None: Trackio makes one up
        every: int | None = 10,  # training batches from one report to the next; None: rows only
        **init: Any,  # of `trackio.init`: group space_id …
    ):
        super().__init__(every)
        self.project, self.run_to_begin, self.init = project, name, init
        self.run_name: str | None = None  # of the callback's own run, once it has begun
        self._is_own = False

    def begin(self) -> Any:
        trackio = imported("trackio", "TrackioCallback", "trackio")
        run = trackio.context_vars.current_run.get()
        self._is_own = run is None
        if run is None:
            name, resume = (self.run_to_begin, "never") if self.run_name is None else (self.run_name, "allow")
            options = {"embed": False, "config": description(self.learn), **self.init}
            run = trackio.init(project=self.project, name=name, resume=resume, **options)
            self.run_name = run.name
        return run

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        self.target.log(numbers, step=step)

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        self.target.log(numbers_of_row(row), step=step)

    def end(self, how: str) -> None:
        if self._is_own:
            imported("trackio", "TrackioCallback", "trackio").finish()
