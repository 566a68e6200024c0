"""The table and the bar: live in a notebook and a terminal, plain lines in a file."""

import sys
import time
from typing import Any

from fastcore.basics import noop

from learnloop.loop.callback import Callback
from learnloop.loop.interrupt import in_notebook

DRAW_EVERY = 0.1  # seconds between two drawings of the bar


class ProgressCallback(Callback):
    """Shows the rows of the recorder as a table, and a bar over the batches, through fastprogress.

    Where the output is no terminal and no notebook, it prints complete lines and no bar. The bar is drawn at most ten
    times a second, and only then is the smoothed loss brought to the host. Cost per batch: reading the clock.
    """

    order = 60

    def __init__(self) -> None:
        self.mbar: Any = None  # over the epochs
        self.pbar: Any = None  # over the batches of the phase
        self._next = 0.0
        self._former_logger: Any = None
        self._table: _PlainTable | None = None

    def before_fit(self) -> None:
        learn = self.learn
        self._next = 0.0
        live = _bars()
        if learn.create_mbar and live is not None:
            self.mbar = live[0](range(learn.n_epoch))
            self.mbar.update(0)
        if learn.logger is not noop:
            self._former_logger, learn.logger = learn.logger, self._write_row
            self._table = _PlainTable()
            recorder = learn.__dict__.get("recorder")
            if recorder is not None:
                self._write_row(recorder.metric_names)

    def before_epoch(self) -> None:
        if self.mbar is not None and self.learn.epoch:
            self.mbar.main_bar.last_v = self.learn.epoch

    def before_train(self) -> None:
        self._launch()

    def before_validate(self) -> None:
        self._launch()

    def _launch(self) -> None:
        live = _bars()
        if live is None or self.learn._depth:
            return
        self._close_bar()
        total = self.learn.n_iter
        self.pbar = live[1](
            range(total or 0), total="noinfer" if total is None else total, parent=self.mbar, leave=False
        )
        self.pbar.update(0)
        self._next = time.perf_counter() + DRAW_EVERY

    def after_batch(self) -> None:
        if self.pbar is None or time.perf_counter() < self._next:
            return
        self._draw()

    def _draw(self) -> None:
        learn = self.learn
        recorder = learn.__dict__.get("recorder")
        if learn.training and recorder is not None and recorder.smooth_loss.count:
            self.pbar.comment = f"{float(recorder.smooth_loss.value):.4f}"
        total = self.pbar.total
        self.pbar.last_v = -self.pbar.wait_for  # its own throttle counts batches, ours is the clock
        self.pbar.update(learn.iter + 1 if total is None else min(learn.iter + 1, total - 1))
        self._next = time.perf_counter() + DRAW_EVERY

    def cleanup_train(self) -> None:
        self._close_bar()

    def cleanup_validate(self) -> None:
        self._close_bar()

    def _close_bar(self) -> None:
        bar, self.pbar = self.pbar, None
        if bar is not None and not self.learn._depth:
            bar.on_iter_end()

    def after_epoch(self) -> None:
        if self.mbar is not None:
            self.mbar.main_bar.update(self.learn.epoch + 1)

    def cleanup_fit(self) -> None:
        """Closes the bars and puts the logger back, whatever ended the fit."""
        self._close_bar()
        mbar, self.mbar, self._table = self.mbar, None, None
        if self._former_logger is not None:
            self.learn.logger, self._former_logger = self._former_logger, None
        if mbar is not None:
            mbar.on_iter_end()

    def _write_row(self, row: Any) -> None:
        cells = ["" if v is None else f"{v:.6f}" if isinstance(v, float) else str(v) for v in row]
        if in_notebook() and self.mbar is not None:
            self.mbar.write(cells, table=True)
        elif self._table is not None:
            print(self._table.line(cells), flush=True)


class _PlainTable:
    """Lines of cells in columns as wide as their titles, at least eight characters."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def line(self, cells: list[str]) -> str:
        self.widths = self.widths or [max(8, len(c)) for c in cells]
        return "  ".join(c.ljust(w) for c, w in zip(cells, self.widths, strict=False)).rstrip()


def _bars() -> Any:
    """fastprogress's (master bar, progress bar) for a notebook or a terminal; None for a file."""
    if in_notebook():
        from fastprogress.fastprogress import NBMasterBar, NBProgressBar

        return NBMasterBar, NBProgressBar
    if sys.stdout is not None and sys.stdout.isatty():
        from fastprogress.fastprogress import ConsoleMasterBar, ConsoleProgressBar

        return ConsoleMasterBar, ConsoleProgressBar
    return None
