"""MLflow: a run per learner, in a store of files, a database or a server."""

import re
import time
from typing import Any

from learnloop.callbacks.reports import Reports, description, numbers_of_row
from learnloop.integrations.packages import imported

__all__ = ["MLflowCallback"]

_STATUS = {"done": "FINISHED", "removed": "FINISHED", "interrupted": "KILLED", "error": "FAILED"}


class MLflowCallback(Reports):
    """Logs losses, hypers, metrics and a description of a fit to a run of MLflow.

    A run that you began yourself by `mlflow.start_run` is used and left open. Without one the callback makes its own
    and ends it with the fit, as finished, killed (Ctrl-C) or failed; a later or a resumed fit goes on with it. MLflow's
    global state stays as it is. It acts in `before_fit`, `after_batch`, `after_epoch` and `cleanup_fit`.
    Source: mlflow.org/docs/latest. Cost per batch: with a store of files some 1 ms every `every` batches, in which
    it waits for the loss.
    """

    _stateattrs = ("run_id",)

    def __init__(
        self,
        experiment: str = "learnloop",  # made if it is not there
        run_name: str | None = None,  # None: MLflow makes one up
        tracking_uri: str | None = None,  # where; None: as MLflow is set up
        every: int | None = 10,  # training batches from one report to the next; None: rows only
    ):
        super().__init__(every)
        self.experiment, self.run_name, self.tracking_uri = experiment, run_name, tracking_uri
        self.run_id: str | None = None  # of the callback's own run
        self._id = ""  # of the run that is written to

    def begin(self) -> Any:
        mlflow = imported("mlflow", "MLflowCallback", "mlflow")
        client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        active = mlflow.active_run() if self.tracking_uri is None else None
        self._id = self._own_run(client) if active is None else active.info.run_id
        known = client.get_run(self._id).data.params  # which cannot be changed any more
        params = {name: value for name, value in description(self.learn).items() if name not in known}
        client.log_batch(self._id, params=[mlflow.entities.Param(n, str(v)[:500]) for n, v in params.items()])
        self._metric = mlflow.entities.Metric
        return client

    def _own_run(self, client: Any) -> str:
        if self.run_id is None:
            found = client.get_experiment_by_name(self.experiment)
            experiment_id = client.create_experiment(self.experiment) if found is None else found.experiment_id
            self.run_id = client.create_run(experiment_id, run_name=self.run_name).info.run_id
        else:
            client.update_run(self.run_id, status="RUNNING")
        return str(self.run_id)

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        self._write(step, numbers)

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        self._write(step, numbers_of_row(row))

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.target.log_batch(self._id, [self._metric(allowed(n), v, now, step) for n, v in numbers.items()])

    def end(self, how: str) -> None:
        if self._id == self.run_id:
            self.target.set_terminated(self._id, status=_STATUS[how])


def allowed(name: str) -> str:
    """A name with the characters that MLflow takes: letters, digits, and `_ - . : / ` and space."""
    return re.sub(r"[^\w\-.:/ ]", "_", name)
