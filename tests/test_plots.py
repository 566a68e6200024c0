"""Pictures, looked at through the artists that matplotlib holds."""

import subprocess
import sys
from typing import ClassVar

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from learnloop.plots import (
    as_png,
    plot_differences,
    plot_histories,
    plot_layers,
    plot_losses,
    plot_samples,
    plot_schedules,
    subplots,
)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return Figure().add_subplot()


def lines(ax):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


RAW = [float(10 - i) for i in range(10)]
SMOOTH = [x + 0.5 for x in RAW]


def test_the_smoothed_losses_are_the_line_and_the_raw_ones_lie_behind(ax):
    plot_losses(ax, RAW, SMOOTH)
    assert lines(ax) == {"train": ([5, 6, 7, 8, 9], [5.5, 4.5, 3.5, 2.5, 1.5])}
    (behind,) = ax.collections
    assert behind.get_segments()[0].tolist() == [[5, 5], [6, 4], [7, 3], [8, 2], [9, 1]]


def test_without_smoothing_the_losses_are_the_line(ax):
    plot_losses(ax, RAW, skip_start=8)
    assert lines(ax) == {"train": ([8, 9], [2.0, 1.0])}
    assert len(ax.collections) == 0


def test_validation_losses_stand_where_they_were_computed(ax):
    plot_losses(ax, RAW, SMOOTH, [3, 6, 8, 10], [9.0, 4.0, None, 2.0])
    assert lines(ax)["valid"] == ([6, 10], [4.0, 2.0])


def test_train_is_the_first_line_and_valid_the_second(ax):
    plot_losses(ax, RAW, SMOOTH, [10], [2.0])
    assert list(lines(ax)) == ["train", "valid"]


def test_epochs_are_dotted_lines(ax):
    plot_losses(ax, RAW, SMOOTH, epoch_iters=[5, 10])
    assert [(line.get_xdata()[0], line.get_linestyle()) for line in ax.lines[1:]] == [(5, ":"), (10, ":")]


def test_axes_are_labelled(ax):
    plot_losses(ax, RAW, SMOOTH, [10], [2.0])
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("learning curve", "steps", "loss")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "valid"]


def test_log_makes_both_axes_logarithmic(ax):
    plot_losses(ax, RAW, SMOOTH, log=True)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


@pytest.mark.parametrize("n", [0, 1, 5])
def test_fewer_losses_than_are_skipped_make_an_empty_picture(n, ax, tmp_path):
    plot_losses(ax, RAW[:n], SMOOTH[:n], [n], [1.0], skip_start=6)
    assert lines(ax) == {"train": ([], []), "valid": ([], [])}
    ax.figure.savefig(tmp_path / "empty.png")


def test_a_picture_without_axes_given_goes_into_the_current_ones():
    current = plt.gca()
    assert plot_losses(None, RAW) is current


def test_axes_given_leave_pyplot_alone(ax):
    assert plot_losses(ax, RAW, SMOOTH) is ax
    assert plt.get_fignums() == []


def test_each_schedule_has_axes_of_its_own():
    fig = plot_schedules({"lr": [0.1, 0.2], "mom": [0.9, 0.8], "wd": [0.0, 0.0]})
    assert [ax.get_ylabel() for ax in fig.axes] == ["lr", "mom", "wd"]
    assert [list(ax.lines[0].get_ydata()) for ax in fig.axes] == [[0.1, 0.2], [0.9, 0.8], [0.0, 0.0]]
    assert fig is plt.gcf()


@pytest.mark.parametrize(("n", "size"), [(1, (6, 4)), (2, (12, 4)), (3, (12, 8))])
def test_figures_grow_with_the_number_of_axes(n, size):
    fig, axes = subplots(n)
    assert tuple(fig.get_size_inches()) == size
    assert len(axes) == len(fig.axes) == n


def test_a_size_given_is_taken():
    assert tuple(plot_schedules({"lr": [0.1]}, figsize=(3, 2)).get_size_inches()) == (3, 2)


def test_no_schedule_to_plot_says_what_to_do():
    with pytest.raises(ValueError, match="Train with a schedule first"):
        plot_schedules({})


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, learnloop.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Layers, samples, several trainings


def test_layers_are_lines_with_names(ax):
    plot_layers(ax, [0, 2], {"a": [1.0, 2.0], "b": [3.0, 4.0]}, "norm", log=True, guide=0.5)
    assert lines(ax)["a"] == ([0, 2], [1.0, 2.0])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("batch", "norm", "log")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert len(ax.lines) == 3


def test_of_many_layers_the_legend_names_ten_at_most(ax):
    plot_layers(ax, [0], {f"layer {i}": [1.0] for i in range(53)}, "norm")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f"layer {i}" for i in range(0, 53, 6)]


def test_bytes_and_stretched_values_are_images_from_0_to_1():
    fig = plot_samples([torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([[-1.0, 3.0]]), torch.zeros(2, 2)])
    assert [ax.images[0].get_array().tolist() for ax in fig.axes] == [[[0, 1]], [[0, 1]], [[0, 0], [0, 0]]]


def test_no_sample_is_an_empty_figure():
    assert plot_samples([]).axes == []


HISTORY = [{"epoch": 0, "valid_loss": 2.0, "time": "00:01"}, {"epoch": 1, "valid_loss": None, "accuracy": 0.5}]


def test_several_trainings_are_lines_in_axes_of_each_column():
    class Recorder:
        history: ClassVar = [{"epoch": 0, "valid_loss": 1.0}]

    fig = plot_histories({"a": HISTORY, "b": Recorder()})
    assert [ax.get_ylabel() for ax in fig.axes] == ["valid_loss", "accuracy"]
    assert lines(fig.axes[0]) == {"a": ([0], [2.0]), "b": ([0], [1.0])}
    assert lines(fig.axes[1]) == {"a": ([1], [0.5]), "b": ([], [])}
    assert [ax.get_ylabel() for ax in plot_histories({"a": HISTORY}, "accuracy").axes] == ["accuracy"]


def test_a_column_that_nobody_has_is_an_error_with_those_there_are():
    with pytest.raises(ValueError, match="no column acuracy in these histories; there is valid_loss, accuracy"):
        plot_histories({"a": HISTORY}, ["acuracy"])
    with pytest.raises(ValueError, match="no column at all in these histories; there is none"):
        plot_histories({"a": []})


def test_differences_stand_below_each_other_and_those_that_may_be_none_are_grey(ax):
    plot_differences(ax, ["a", "b"], [(0.2, 0.1, 0.3), (0.0, -0.1, 0.1)], [[0.15, 0.25], []])
    first, second = [line for line in ax.lines if line.get_lw() == 2 and len(line.get_xdata()) == 2][:2]
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0.1, 0.3], [0, 0])
    assert first.get_color() != second.get_color() == "#8a8a8a"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim() == (1.5, -0.5)  # the first on top


def test_an_interval_without_ends_is_a_point_only(ax):
    plot_differences(ax, ["a"], [(0.2, -float("inf"), float("inf"))])
    assert sum(len(line.get_xdata()) == 2 and line.get_lw() == 2 for line in ax.lines) == 0


def test_a_picture_is_a_png_and_leaves_no_figure_behind():
    fig, _ = subplots(1)
    assert as_png(fig).startswith(b"\x89PNG")
    assert plt.get_fignums() == []


def test_trainings_are_plotted_by_name():
    with pytest.raises(TypeError, match=r"^`plot_histories` takes trainings by name, .* something of type list\.$"):
        plot_histories([])
