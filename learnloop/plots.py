"""Pictures of plain numbers; the only module that draws. matplotlib is imported when something is drawn."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "as_png",
    "plot_columns",
    "plot_density",
    "plot_differences",
    "plot_histories",
    "plot_layers",
    "plot_losses",
    "plot_matrix",
    "plot_profile",
    "plot_rates",
    "plot_samples",
    "plot_schedules",
    "plot_values",
    "subplots",
]

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


def as_png(figure: Figure, dpi: int = 90) -> bytes:
    """A figure as a picture; pyplot forgets it."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    plt.close(figure)
    return file.getvalue()


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
    plot_values(axes, hps)
    return fig


def plot_values(axes: Sequence[Axes], hps: Mapping[str, Sequence[float]]) -> None:
    """Each hyper-parameter over the training batches, in axes of its own."""
    for ax, (name, values) in zip(axes, hps.items(), strict=True):
        ax.plot(values, color=TRAIN, lw=2)
        _label(ax, "steps", name)


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


def plot_layers(
    ax: Axes,
    x_values: Sequence[int],
    layers: Mapping[str, Sequence[float]],  # name -> a number for each of `x_values`
    y: str,  # what the numbers are
    *,
    legend: bool = True,
    log: bool = False,  # the numbers on a logarithmic axis
    x: str = "batch",
    guide: float | None = None,  # a dotted line at this height
) -> Axes:
    """A line per layer, colored from the first to the last; of many layers the legend names some."""
    import matplotlib.pyplot as plt

    colors = (
        [TRAIN]
        if len(layers) < 2
        else plt.get_cmap("viridis")([0.9 * i / (len(layers) - 1) for i in range(len(layers))])
    )
    named = set(list(layers)[:: max(1, math.ceil(len(layers) / 10))])
    for (name, values), color in zip(layers.items(), colors, strict=True):
        ax.plot(x_values, values, color=color, lw=1.5, label=name if name in named else None)
    if guide is not None:
        ax.axhline(guide, color=GUIDE, ls=":", lw=1, zorder=1)
    if log:
        ax.set_yscale("log")
    _label(ax, x, y)
    if legend and layers:
        ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_density(
    ax: Axes,
    rows: Sequence[Sequence[float]],  # (bins, batches)
    iters: Sequence[int],  # the number of each batch
    limits: tuple[float, float],  # of the lowest and the highest bin
    title: str = "",
) -> Axes:
    """How values are spread over bins, batch by batch from left to right: the more there are, the brighter."""
    first, last = (iters[0], iters[-1]) if len(iters) else (0, 1)
    ax.imshow(rows, origin="lower", aspect="auto", extent=(first - 0.5, last + 0.5, *limits), interpolation="nearest")
    _label(ax, "batch", "value")
    ax.grid(False)
    ax.set_title(title)
    return ax


def plot_matrix(
    ax: Axes,
    matrix: Sequence[Sequence[float]],  # a row per actual class, a column per predicted one
    names: Sequence[Any],  # of the classes
    *,
    title: str = "",
    cmap: Any = "Blues",
    decimals: int | None = None,  # None: whole numbers
    with_text: bool = True,  # write the numbers
) -> Axes:
    """A confusion matrix: the more in a cell, the darker."""
    ax.imshow(matrix, cmap=cmap, interpolation="nearest")
    ticks = list(range(len(names)))
    ax.set_xticks(ticks, [str(n) for n in names], rotation=90 if any(len(str(n)) > 2 for n in names) else 0)
    ax.set_yticks(ticks, [str(n) for n in names])
    half = max((v for row in matrix for v in row), default=0) / 2
    for i, row in enumerate(matrix) if with_text else ():
        for j, v in enumerate(row):
            text = f"{v}" if decimals is None else f"{v:.{decimals}f}"
            ax.text(j, i, text, ha="center", va="center", fontsize="small", color="white" if v > half else "black")
    ax.set(xlabel="Predicted", ylabel="Actual", title=title)
    return ax


def plot_samples(
    samples: Sequence[Any],  # tensors of shape (c, h, w) or (h, w): images; (n,): lines; anything else as text
    titles: Sequence[str] = (),
    *,
    colors: Sequence[str | None] = (),  # of the titles; None: black
    cols: int | None = None,  # in a row; None: as many as make about a square, 6 at most
    figsize: tuple[float, float] | None = None,  # inches
) -> Figure:
    """Samples side by side, each with its title."""
    n = len(samples)
    cols = min(6, max(1, math.ceil(math.sqrt(n)))) if cols is None else max(1, min(cols, n or 1))
    lines = max((title.count("\n") + 1 for title in titles), default=0)
    size = figsize or (2.2 * cols, (2.0 + 0.2 * lines) * max(1, math.ceil(n / cols)))
    fig, axes = subplots(n, cols, size)
    for i, (ax, sample) in enumerate(zip(axes, samples, strict=True)):
        _draw_sample(ax, sample)
        if i < len(titles):
            ax.set_title(titles[i], fontsize="small", color=(colors[i] if i < len(colors) else None) or "black")
    return fig


#: Colors of the titles of predictions that are right and wrong.
RIGHT, WRONG = "#2e7d32", "#c62828"


def _draw_sample(ax: Axes, sample: Any) -> None:
    shape = tuple(getattr(sample, "shape", ()))
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        image = sample[0] if shape[0] == 1 else sample.permute(1, 2, 0)
        _draw_image(ax, image)
    elif len(shape) == 2:
        _draw_image(ax, sample)
    elif len(shape) == 1 and shape[0] > 1:
        ax.plot(sample.detach().float().cpu().numpy(), color=TRAIN, lw=1)
        ax.tick_params(labelsize="x-small")
        ax.spines[["top", "right"]].set_visible(False)
    else:
        text = textwrap.fill(str(sample), 24, max_lines=8, placeholder=" …")
        ax.text(0.5, 0.5, text, ha="center", va="center", fontsize="x-small", transform=ax.transAxes)
        ax.set_axis_off()


def _draw_image(ax: Axes, image: Any) -> None:
    """Values from 0 to 1 as they are, bytes by 255; what goes beyond is stretched to fit."""
    image = image.detach().float().cpu() / (1 if image.is_floating_point() or image.max() <= 1 else 255)
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        image, low, high = (image - low) / ((high - low) or 1), 0.0, 1.0
    ax.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set_axis_off()


def plot_columns(
    axes: Sequence[Axes],
    history: Sequence[Mapping[str, Any]],  # a row per epoch
    columns: Mapping[str, Sequence[str]],  # a title for each axes -> the columns that are its lines
) -> None:
    """Columns of a training's rows over its epochs."""
    for ax, (title, names) in zip(axes, columns.items(), strict=True):
        for name, (color, marker) in zip(names, cycle([(TRAIN, "o"), *MARKS])):
            x, y = _points(history, name)
            ax.plot(x, y, color=color, lw=1.5, marker=marker, ms=4, label=name)
        _label(ax, "epoch", title)
        ax.locator_params(axis="x", integer=True)
        if len(names) > 1:
            ax.legend(frameon=False)


def plot_histories(
    histories: Mapping[str, Any],  # name -> a Recorder, or its `history`: a row per epoch
    columns: str | Sequence[str] | None = None,  # such as 'valid_loss'; None: all that any of them has, but the time
    *,
    figsize: tuple[float, float] | None = None,  # inches
) -> Figure:
    """Several trainings in one figure, axes for each column, a line for each training.

    A Recorder forgets its rows when the next fit begins: keep `learn.recorder.history` of the one before.
    """
    if not isinstance(histories, Mapping):
        raise TypeError(
            "`plot_histories` takes trainings by name, such as `{'adam': learn.recorder}`, and got something of type "
            f"{type(histories).__name__}."
        )
    rows = {name: list(h.history if hasattr(h, "history") else h) for name, h in histories.items()}
    known = list(dict.fromkeys(k for of in rows.values() for row in of for k in row if k not in ("epoch", "time")))
    wanted = known if columns is None else [columns] if isinstance(columns, str) else list(columns)
    unknown = [c for c in wanted if c not in known]
    if unknown or not wanted:
        raise ValueError(
            f"no column {', '.join(unknown) or 'at all'} in these histories; there is {', '.join(known) or 'none'}."
        )
    fig, axes = subplots(len(wanted), figsize=figsize)
    for ax, column in zip(axes, wanted, strict=True):
        for name, (color, marker) in zip(rows, cycle([(TRAIN, "o"), *MARKS])):
            x, y = _points(rows[name], column)
            ax.plot(x, y, color=color, lw=1.5, marker=marker, ms=4, label=name)
        _label(ax, "epoch", column)
        ax.locator_params(axis="x", integer=True)
        ax.legend(frameon=False)
    return fig


#: Colors of the loop's parts in a profile; callbacks have the last one.
PART_COLORS = {
    **{"loader": "#d9622b", "to device": "#e9a37f", "forward": "#1f5a94", "loss": "#6c9bd1", "backward": "#2e8b57"},
    **{"step": "#8a4fbf", "zero_grad": "#c3a5e0", "loop": "#8a8a8a"},
}
OTHER_PART = "#c9a227"


def plot_profile(
    parts: Mapping[str, float],  # title -> milliseconds per batch
    intervals: Sequence[tuple[str, float, float]],  # (title, start, length) in milliseconds, `device: ` before some
    title: str = "",
    figsize: tuple[float, float] | None = None,  # inches
    most: int = 14,  # parts shown, the longest
) -> Figure:
    """Bars for what each part takes, and below them a line of time on which each interval is a block."""
    import matplotlib.pyplot as plt

    shown = sorted(sorted(parts, key=lambda name: -parts[name])[:most], key=list(parts).index)
    height = 1.2 + 0.28 * len(shown)
    fig, (above, below) = plt.subplots(
        2, 1, figsize=figsize or (10, height + 1.8), height_ratios=(height, 1.5), layout="constrained"
    )
    widths = [parts[name] for name in shown]
    bars = above.barh(shown, widths, color=[PART_COLORS.get(name, OTHER_PART) for name in shown])
    above.bar_label(bars, [f"{w:.3g}" for w in widths], padding=3, fontsize="small")
    above.invert_yaxis()
    _label(above, "ms per batch", "")
    above.set_title(title)
    rows = ["host", "device"] if any(name.startswith("device: ") for name, _, _ in intervals) else ["host"]
    for name, start, length in intervals:
        part = name.removeprefix("device: ")
        row = int(part != name)
        below.broken_barh([(start, length)], (row - 0.4, 0.8), color=PART_COLORS.get(part, OTHER_PART))
    below.set_yticks(range(len(rows)), rows)
    below.invert_yaxis()
    _label(below, "ms", "")
    return fig


def plot_differences(
    ax: Axes,
    names: Sequence[str],
    intervals: Sequence[tuple[float, float, float]],  # the mean and both ends of each; infinite ends are not drawn
    seeds: Sequence[Sequence[float]] = (),  # single differences behind each
) -> Axes:
    """Differences below each other with their intervals, the first on top; those that may be none are grey."""
    for i, (mean, low, high) in enumerate(intervals):
        color = GUIDE if low <= 0 <= high else TRAIN
        if math.isfinite(high - low):
            ax.plot([low, high], [i, i], color=color, lw=2, solid_capstyle="butt", zorder=3)
        ax.plot(mean, i, "o", color=color, ms=7, mec="white", mew=1, zorder=4)
        behind = seeds[i] if i < len(seeds) else ()
        ax.plot(behind, [i + 0.18] * len(behind), ".", color=RAW, ms=6, zorder=2)
    ax.axvline(0, color="black", lw=0.8, zorder=1)
    _label(ax, "difference", "")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    return ax


def _points(history: Sequence[Mapping[str, Any]], column: str) -> tuple[list[int], list[float]]:
    """Epochs and numbers of a column, where it has any."""
    rows = [row for row in history if row.get(column) is not None]
    return [row["epoch"] for row in rows], [float(row[column]) for row in rows]


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
