"""Pictures of plain numbers; the only module that draws. matplotlib is imported when something is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_losses", "plot_rates", "plot_schedules", "subplots"]

RAW, TRAIN, GUIDE = "#9db4cc", "#1f5a94", "#8a8a8a"
#: Color and shape of suggestions, and of the losses of validation sets.
MARKS = (("#d9622b", "o"), ("#2e8b57", "s"), ("#8a4fbf", "D"), ("#c9a227", "^"))


def subplots(n: int, cols: int = 2, figsize: tuple[float, float] | None = None) -> tuple[Figure, list[Axes]]:
    """A pyplot figure with exactly `n` axes, `cols` in a row; `figsize` in inches, default 6 by 4 for each."""
    import matplotlib.pyplot as plt

    cols = max(1, min(cols, n))
    rows = max(1, math.ceil(n / cols))
    fig, grid = plt.subplots(rows, cols, figsize=figsize or (6 * cols, 4 * rows), squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for unused in axes[n:]:
        unused.remove()
    return fig, axes[:n]


def plot_losses(
    ax: Axes | None,  # None: pyplot's current axes
    losses: Sequence[float],  # one per training batch
    smooth: Sequence[float] | None = None,  # the same, smoothed; None: the losses themselves are the line
    valid_iters: Sequence[int] = (),  # training batches done at each validation
    valid_losses: Sequence[float | None] | Mapping[str, Sequence[float | None]] = (),  # None where an epoch has none
    *,
    skip_start: int = 5,  # batches left out at the beginning, where losses are far off
    log: bool = False,  # both axes
    epoch_iters: Sequence[int] = (),  # batches done at the end of each epoch: a dotted line there
) -> Axes:
    """The learning curve: raw losses behind, the smoothed ones as a line, validation losses as joined points.

    Of several validation sets `valid_losses` maps the name to the losses.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.gca()
    steps = range(skip_start, len(losses))
    if smooth is not None and steps:
        _draw_behind(ax, steps, losses[skip_start:])
    ax.plot(steps, (losses if smooth is None else smooth)[skip_start:], color=TRAIN, lw=2, label="train", zorder=3)
    for n in epoch_iters:
        ax.axvline(n, color=GUIDE, ls=":", lw=1, zorder=1)
    sets = valid_losses if isinstance(valid_losses, Mapping) else {"valid": valid_losses}
    for (name, of_set), (color, marker) in zip(sets.items(), cycle(MARKS)) if len(valid_iters) else ():
        points = [(n, loss) for n, loss in zip(valid_iters, of_set, strict=True) if loss is not None]
        points = [(n, loss) for n, loss in points if n >= skip_start]
        x, y = zip(*points, strict=True) if points else ((), ())
        ax.plot(x, y, color=color, lw=1.5, marker=marker, ms=5, mec="white", mew=0.8, label=name, zorder=4)
    if log:
        ax.set_xscale("log")
        ax.set_yscale("log")
    _label(ax, "steps", "loss")
    ax.set_title("learning curve")
    ax.legend(frameon=False)
    return ax


def plot_schedules(hps: Mapping[str, Sequence[float]], figsize: tuple[float, float] | None = None) -> Figure:
    """Each hyper-parameter over the training batches in axes of its own, two in a row; ValueError where there is none.

    `figsize` in inches, default 6 by 4 for each.
    """
    if not hps:
        raise ValueError("there is no hyper-parameter to plot. Train with a schedule first, as `fit_one_cycle` does.")
    fig, axes = subplots(len(hps), figsize=figsize)
    for ax, (name, values) in zip(axes, hps.items(), strict=True):
        ax.plot(values, color=TRAIN, lw=2)
        _label(ax, "steps", name)
    return fig


def plot_rates(
    ax: Axes | None,  # None: those of a new pyplot figure
    rates: Sequence[float],
    losses: Sequence[float],  # one per rate, smoothed
    points: Sequence[tuple[str, tuple[float, float]]] = (),  # (name, (rate, loss)): suggestions to mark
) -> Axes:
    """The loss over the learning rate, which is on a logarithmic axis, with each suggestion as a point."""
    if ax is None:
        _, (ax,) = subplots(1)
    ax.plot(rates, losses, color=TRAIN, lw=2)
    for (name, (rate, loss)), (color, marker) in zip(points, cycle(MARKS)):
        ax.plot(rate, loss, marker, color=color, ms=9, mec="white", mew=1.2, label=name, zorder=4)
    ax.set_xscale("log")
    _label(ax, "Learning Rate", "Loss")  # as fastai writes them
    if points:
        ax.legend(frameon=False)
    return ax


def _draw_behind(ax: Axes, x: Sequence[int], y: Sequence[float]) -> None:
    """The raw losses as a collection, so that `ax.lines` begins with train, as those who restyle it expect."""
    from matplotlib.collections import LineCollection

    ax.add_collection(LineCollection([list(zip(x, y, strict=True))], colors=RAW, linewidths=0.8, alpha=0.7, zorder=2))


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, color=GUIDE, alpha=0.2, lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
