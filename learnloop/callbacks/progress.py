"""The table and the bar: live in a notebook and a terminal, plain lines in a file."""

import functools
import math
import sys
import time
from typing import Any

from fastcore.basics import noop

from learnloop.loop.callback import Callback
from learnloop.loop.interrupt import in_notebook
from learnloop.loop.passes import waits

DRAW_EVERY = 0.2  # seconds between two drawings of the bar


class ProgressCallback(Callback):
    """Shows the rows of the recorder as a table, and a bar over the batches, through fastprogress.

    Where the output is no terminal and no notebook, it prints complete lines and no bar. The bar is drawn at most ten
    times a second, and only then are losses brought to the host; from an accelerator they come one drawing later, so
    that nothing waits for it. Cost per batch: reading the clock.
    """

    order = 60
    reads_only = True

    def __init__(self) -> None:
        self.mbar: Any = None  # over the epochs
        self.pbar: Any = None  # over the batches of the phase, once it was drawn
        self._bars: Any = None  # the classes for the place where the output goes; None for a file
        self._next_draw = math.inf  # when the bar is due again; never where there is none
        self._began = 0.0  # when the phase began
        self._updates_before = 0  # `opt_iter` when the phase began
        self._former_logger: Any = None
        self._table: _PlainTable | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no bars before its own fit: those of a terminal cannot be stored."""
        return {**vars(self), "mbar": None, "pbar": None, "_bars": None, "_next_draw": math.inf}

    def before_fit(self) -> None:
        """Shows the bar over the epochs and the titles of the table, for a training."""
        learn = self.learn
        is_training = learn.task not in ("validate", "predict")
        self._bars = _bars()
        if self._bars is not None:
            # Of a run beside the training the bar is all that shows, and nothing if it is quick.
            self._next_draw = 0.0 if is_training else time.perf_counter() + DRAW_EVERY
        if not is_training:
            return
        if self._bars is not None and learn.create_mbar and learn.n_epoch:
            self.mbar = self._bars[0](range(learn.n_epoch))
            self.mbar.update(0)
        if learn.logger is not noop:
            self._begin_table()

    def _begin_table(self) -> None:
        learn = self.learn
        self._former_logger, learn.logger = learn.logger, self._write_row
        self._table = _PlainTable()
        recorder = learn.__dict__.get("recorder")
        if recorder is not None:
            self._write_row(recorder.metric_names)

    def before_epoch(self) -> None:
        if self.mbar is not None:
            self.mbar.main_bar.last_v = self.learn.epoch  # the bar below it takes its number from there

    def before_train(self) -> None:
        self._begin_phase()

    def before_validate(self) -> None:
        self._begin_phase()

    def _begin_phase(self) -> None:
        learn = self.learn
        if learn._depth:
            return
        self._close_bar()
        self._began, self._updates_before = time.time(), learn.opt_iter
        if time.perf_counter() >= self._next_draw:
            self._draw(0)

    def after_batch(self) -> None:
        if time.perf_counter() >= self._next_draw and not self.learn._depth:
            self._draw(self._done())

    def _done(self) -> int:
        learn = self.learn
        return learn.opt_iter - self._updates_before if self._counts_updates() else learn.iter + 1

    def _total(self) -> int | None:
        learn = self.learn
        return min(learn.valid_every, learn.n_step - self._updates_before) if self._counts_updates() else learn.n_iter

    def _counts_updates(self) -> bool:
        return self.learn.training and self.learn.n_step is not None

    def _draw(self, done: int) -> None:
        if self.pbar is None:
            self.pbar = self._new_bar()
        bar, total = self.pbar, self.pbar.total
        recorder = self.learn.__dict__.get("recorder")
        loss = recorder.newest_smooth() if self.learn.training and recorder is not None else None
        if loss is not None:
            bar.comment = f"{float(loss):.4f}"
        elif self.learn.dl_name not in (None, "train", "valid"):
            bar.comment = self.learn.dl_name
        bar.last_v = -bar.wait_for  # its own throttle counts batches, ours is the clock
        bar.update(done if total is None else min(done, total - 1))  # at its total it would close itself
        self._next_draw = time.perf_counter() + DRAW_EVERY

    def _new_bar(self) -> Any:
        """A bar as it is after `update(0)`, which would draw it empty first."""
        total = self._total()
        bar = self._bars[1](
            range(total or 0), total="noinfer" if total is None else total, parent=self.mbar, leave=False
        )
        bar.on_iter_begin()
        bar.start_t, bar.pred_t, bar.wait_for = self._began, None, 1
        return bar

    def cleanup_train(self) -> None:
        self._end_phase()

    def cleanup_validate(self) -> None:
        self._end_phase()

    def _end_phase(self) -> None:
        if not self.learn._depth:
            self._close_bar()

    def _close_bar(self) -> None:
        bar, self.pbar = self.pbar, None
        if bar is not None:
            bar.on_iter_end()

    def after_epoch(self) -> None:
        if self.mbar is not None:
            self.mbar.main_bar.update(self.learn.epoch + 1)

    def after_fit(self) -> None:
        """A line below the table where the loader kept the model waiting."""
        learn = self.learn
        line = "" if self._table is None else waiting_line(waits(learn), learn.train_iter, learn.dls.train)
        if line and in_notebook() and self.mbar is not None:
            self.mbar.write(line)
        elif line:
            self._close_bar()
            print(line, flush=True)

    def cleanup_fit(self) -> None:
        """Closes the bars and puts the logger back, whatever ended the fit."""
        self._close_bar()
        self._next_draw = math.inf
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
            self._close_bar()  # a row begins on a line of its own
            print(self._table.line(cells), flush=True)


WAITS_TOO_LONG = 0.4  # part of the time of training
LEAST_WAITED = 2.0  # seconds in a fit, below which nobody minds


def waiting_line(
    samples: list[tuple[float, float, int]],  # of batches: seconds waited for them, seconds passed, how many
    n_batch: int,  # training batches of the fit
    dl: Any,  # the training loader
) -> str:
    """What to say of a loader that kept a training waiting; nothing where it did not for long."""
    waited, passed, n = (sum(numbers) for numbers in zip(*samples, strict=True)) if samples else (0.0, 0.0, 0)
    if not n or waited < WAITS_TOO_LONG * passed or waited / n * n_batch < LEAST_WAITED:
        return ""
    workers = getattr(dl, "num_workers", None)
    advice = "read in workers (`num_workers=…`)" if workers == 0 else "more workers" if workers else "read faster"
    return f"The loader took {waited / passed:.0%} of the time of training: {advice}; `learn.profile()` shows the rest."


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
    return _console_bars() if sys.stdout is not None and sys.stdout.isatty() else None


@functools.cache
def _console_bars() -> Any:
    """fastprogress's bars for a terminal, kept on one line and gone without a trace when they are closed."""
    from fastprogress.fastprogress import ConsoleMasterBar, ConsoleProgressBar

    class MasterBar(ConsoleMasterBar):
        def __init__(self, gen: Any):
            super().__init__(gen)
            _hide_trial()

    class ProgressBar(ConsoleProgressBar):
        width = 0  # of the longest text: a shorter one must cover it

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            _hide_trial()

        def on_update(self, val: int, text: str) -> None:
            room = self.cols - len(self.prefix) - 5
            self.width = min(room, max(self.width, len(text)))
            super().on_update(val, text[:room].ljust(self.width))

        def on_iter_end(self) -> None:
            self.prefix = ""  # it would stay on the line
            super().on_iter_end()

    return MasterBar, ProgressBar


def _hide_trial() -> None:
    """Covers the character that a console bar prints to see whether the terminal can show it."""
    print(" ", end="\r", flush=True)
