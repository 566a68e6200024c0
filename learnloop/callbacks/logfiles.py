"""Logs of a training in files that can be read while it goes on: rows as CSV, rows and batches as lines of JSON."""

import csv
import io
import json
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from learnloop.callbacks.blockfile import BlockFile
from learnloop.callbacks.reports import Reports, description

__all__ = ["CSVLogger", "JSONLLogger"]


class CSVLogger(Reports):
    """Writes the rows of the record to `learn.path/fname` as CSV: a line of titles, then a line per epoch.

    Only a fit writes: `validate`, `get_preds` and `lr_find` leave the file alone. Each fit begins the file anew, or
    with `append` adds titles and rows of its own; a resumed one goes on with its rows, each of which is there once.
    The folder is made, each line is flushed, a number that is not there is an empty cell. It acts in `before_fit`,
    `after_epoch` and `cleanup_fit`. Source: docs.fast.ai/callback.progress. Cost per batch: none.
    """

    order = 60

    def __init__(self, fname: str | Path = "history.csv", append: bool = False):
        super().__init__(every=None)
        self.fname, self.append = Path(fname), append
        self.log = BlockFile(opening="epoch,")

    def begin(self) -> None:
        if "recorder" not in self.learn.__dict__:
            raise RuntimeError("`CSVLogger` writes the rows of the Recorder: `learn.add_cb(Recorder())`.")
        self.log.open(self.learn.path / self.fname)
        if self.learn._resuming is None:
            self._begin_block()

    def _begin_block(self) -> None:
        self.log.begin(csv_line(self.learn.recorder.metric_names), self.append)

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        if self.log.place is None:  # added to a fit that is resumed, or the file is gone
            self._begin_block()
        self.log.write(csv_line(row.values()))

    def end(self, how: str) -> None:
        self.log.close()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "place": self.log.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        go_on_with(self, state.pop("place"), state)

    def read_log(self) -> Any:
        """The file as a pandas DataFrame; with `append`, the titles of later fits are rows in it."""
        import pandas as pd

        return pd.read_csv(self.learn.path / self.fname)


class JSONLLogger(Reports):
    """Writes lines of JSON to `learn.path/fname`: one per fit, one per row of the record, one per `every` batches.

    Each says in `kind` which it is: `fit` describes the training, `epoch` holds a row by column, `step` the epochs
    done, the smoothed and the raw loss and the hypers of each group. A number that is not finite is null. Lines are
    flushed one by one, so that the file can be read while it grows. Each fit begins the file anew, or is added with
    `append`; a resumed one goes on with its lines. It acts in `before_fit`, `after_batch`, `after_epoch` and
    `cleanup_fit`. Cost per batch: some 150 µs every `every` batches, in which it
    waits for the loss.
    """

    def __init__(
        self,
        fname: str | Path = "history.jsonl",  # below `learn.path` unless absolute; the folder is made
        every: int | None = 10,  # training batches from one line to the next; None: rows only
        append: bool = False,  # keep what is in the file
    ):
        super().__init__(every)
        self.fname, self.append = Path(fname), append
        self.log = BlockFile(opening='{"kind": "fit",')

    def begin(self) -> None:
        self.log.open(self.learn.path / self.fname)
        if self.learn._resuming is None:
            self._begin_block()

    def _begin_block(self) -> None:
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        self.log.begin(json_line({"kind": "fit", "at": at, **description(self.learn)}), self.append)

    def write_step(self, step: int, numbers: dict[str, float]) -> None:
        self._write({"kind": "step", "step": step, **numbers})

    def write_row(self, step: int, row: dict[str, Any]) -> None:
        self._write({"kind": "epoch", "step": step, **row})

    def _write(self, fields: dict[str, Any]) -> None:
        if self.log.place is None:
            self._begin_block()
        self.log.write(json_line(fields))

    def end(self, how: str) -> None:
        self.log.close()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "place": self.log.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        go_on_with(self, state.pop("place"), state)


def go_on_with(logger: CSVLogger | JSONLLogger, place: tuple[int, int] | None, state: dict[str, Any]) -> None:
    """Loads a logger's state; where its file is open, and is not that file any more, all rows are written again."""
    Reports.load_state_dict(logger, state)
    if not logger._is_open:
        logger.log.place = place
    elif place is not None:
        logger.log.go_on(place)
        if logger.log.place is None:
            logger.n_rows = 0


def csv_line(cells: Iterable[Any]) -> str:
    """One line of CSV: None as an empty cell, everything else as `str` gives it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(["" if cell is None else str(cell) for cell in cells])
    return text.getvalue()


def json_line(fields: dict[str, Any]) -> str:
    """One line of JSON that every reader takes: no NaN and no infinity, a text for what JSON has no form for."""
    return json.dumps(_finite(fields), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
