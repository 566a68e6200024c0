"""The learning curve, drawn anew after each epoch where the training runs in a notebook."""

import io
import math
from typing import Any

from learnloop.loop.callback import Callback
from learnloop.loop.interrupt import in_notebook


class ShowGraphCallback(Callback):
    """Shows a graph of training and validation loss under a notebook's cell, and draws it anew after each epoch.

    Its width is that of the whole training. In a terminal or a file it does nothing; `learn.recorder.plot_loss()`
    draws the same once. It acts in `after_epoch`. Source: docs.fast.ai/callback.progress. Cost per batch: none; per
    epoch: a drawing, some 100 ms.
    """

    order, run_valid = 65, False
    tasks = ("fit",)
    reads_only = acts_outside = True

    def __init__(self) -> None:
        self._shown: Any = None  # the output of the cell that is drawn into; None before the first epoch's end

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no place to draw to."""
        return {**vars(self), "_shown": None}

    def after_epoch(self) -> None:
        recorder = self.learn.__dict__.get("recorder")
        if recorder is not None and recorder.iters and in_notebook():
            self._show(graph(self.learn))

    def _show(self, png: bytes) -> None:
        from IPython.display import Image, display

        if self._shown is None:
            self._shown = display(Image(png), display_id=True)
        else:
            self._shown.update(Image(png))

    def cleanup_fit(self) -> None:
        """The next fit has a graph of its own."""
        self._shown = None


def graph(learn: Any) -> bytes:
    """The learning curve so far as a PNG, with room for the epochs to come."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    recorder = learn.recorder
    fig = Figure(figsize=(6, 4), layout="constrained")  # not one of pyplot's, which the cell would show a second time
    ax = recorder.plot_loss(skip_start=0, ax=fig.add_subplot())
    ax.set_xlim(0, expected_batches(recorder.iters, learn.n_epoch - learn.epoch - 1))
    ax.set_ylim(*limits([loss for line in ax.lines for loss in line.get_ydata()]))
    file = io.BytesIO()
    FigureCanvasAgg(fig).print_png(file)
    return file.getvalue()


def expected_batches(iters: list[int], n_left: int) -> int:
    """Training batches of the whole fit, if the epochs that are left are as long as the first one.

    `iters`: batches done at the end of each epoch so far.
    """
    return max(1, iters[-1] + n_left * iters[0])


def limits(losses: list[float]) -> tuple[float, float]:
    """From 0, or the lowest loss if that is below, to a little over the highest; a loss that is not finite is none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    lowest, highest = min([0.0, *finite]), max([0.0, *finite])
    return lowest, lowest + 1.05 * (highest - lowest) if highest > lowest else lowest + 1
