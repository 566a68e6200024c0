"""ProgressCallback: the same numbers as lines in a file, a bar in a terminal, a table in a notebook."""

import io
import os
import re
import signal
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks import progress
from learnloop.callbacks.progress import waiting_line

ROOT = Path(__file__).parents[2]


def mae(pred, y):
    return (pred - y).abs().mean()


def line(n):
    x = torch.linspace(0, 1, n)[:, None]
    return x, 2 * x + 1


def learner(cbs=None, n_batch=3, **kwargs):
    """Training batches of two and three for validation, with the callbacks that a learner has by default."""
    model = nn.Linear(1, 1)
    model.load_state_dict({"weight": torch.tensor([[0.5]]), "bias": torch.zeros(1)})
    dls = ll.DataLoaders(ll.TensorLoader(*line(2 * n_batch), bs=2), ll.TensorLoader(*line(5), bs=2), device="cpu")
    return ll.Learner(dls, model, nn.MSELoss(), opt_func=ll.SGD, lr=0.1, cbs=cbs, **{"metrics": mae, **kwargs})


def raises(event, error, epoch=0, batch=None):
    """A callback that raises in one epoch, or in one batch of its training."""

    def act(cb):
        learn = cb.learn
        if learn.epoch == epoch and (batch is None or (learn.training and learn.iter == batch)):
            raise error

    return ll.Callback(**{event: act})


TABLE = """\
epoch     train_loss  valid_loss  mae       time
0         2.143064    0.548458    0.646950  00:00
1         1.234302    0.122203    0.283220  00:00
"""


# In a file


def test_a_file_gets_complete_lines_without_carriage_returns(tmp_path):
    with open(tmp_path / "out.txt", "w", newline="") as file, redirect_stdout(file):
        learner().fit(2)
    assert (tmp_path / "out.txt").read_bytes().decode() == TABLE


def written(run):
    """What a function prints where no terminal is."""
    out = io.StringIO()
    with redirect_stdout(out):
        run()
    return out.getvalue()


def test_the_columns_of_a_table_without_metrics_and_time():
    learn = learner(metrics=None)
    learn.recorder.add_time = False
    assert written(lambda: learn.fit(1)) == (
        "epoch     train_loss  valid_loss\n"  # two spaces between the columns
        "0         2.143064    0.548458\n"
    )


def test_a_long_title_widens_its_column():
    learn = learner(metrics=ll.ValueMetric(lambda: 1.0, "a_rather_long_name"))
    assert written(lambda: learn.fit(1)).splitlines() == [
        "epoch     train_loss  valid_loss  a_rather_long_name  time",
        "0         2.143064    0.548458    1.000000            00:00",
    ]


def test_a_phase_that_was_cancelled_has_empty_cells():
    learn = learner(raises("before_validate", ll.CancelValidException))
    assert written(lambda: learn.fit(2)).splitlines() == [
        "epoch     train_loss  valid_loss  mae       time",
        "0         2.143064                          00:00",
        "1         1.234302    0.122203    0.283220  00:00",
    ]


def test_every_row_is_there_as_soon_as_its_epoch_is_over():
    sizes, out = [], io.StringIO()
    with redirect_stdout(out):
        learner(ll.Callback(cleanup_epoch=lambda cb: sizes.append(out.getvalue().count("\n")))).fit(2)
    assert sizes == [2, 3]


def test_validate_prints_nothing():
    learn = learner()
    assert written(learn.validate) == ""
    assert written(lambda: learn.fit(1, cbs=ll.Callback(after_epoch=lambda cb: cb.learn.validate()))).count("\n") == 2


def test_entering_a_learner_by_hand_prints_nothing():
    def enter():
        with learner():
            pass

    assert written(enter) == ""


def test_no_epoch_gives_the_titles_alone():
    assert written(lambda: learner().fit(0)) == "epoch     train_loss  valid_loss  mae       time\n"


def test_no_logging_shows_no_rows():
    learn = learner()
    with learn.no_logging():
        assert written(lambda: learn.fit(1)) == ""
    assert learn.logger is print


def test_no_bar_hands_the_rows_to_the_logger():
    learn, rows = learner(), []
    callback, learn.logger = learn.progress, rows.append
    with learn.no_bar():
        assert not hasattr(learn, "progress")
        assert written(lambda: learn.fit(1)) == ""
    assert [row[0] for row in rows] == [0]
    assert learn.progress is callback


@pytest.mark.parametrize("event", ["before_fit", "before_epoch", "before_train", "before_batch", "after_fit"])
def test_an_error_puts_the_logger_back(event):
    learn = learner(raises(event, ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        written(lambda: learn.fit(1))
    assert learn.logger is print
    assert (learn.progress.mbar, learn.progress.pbar) == (None, None)


def test_ctrl_c_leaves_the_rows_of_the_epochs_that_were_done():
    def press(cb):
        if cb.epoch == 1:
            signal.raise_signal(signal.SIGINT)

    def fit():
        with pytest.raises(KeyboardInterrupt):
            learn.fit(3, cbs=ll.Callback(before_train=press))

    learn = learner()
    assert written(fit) == "".join(TABLE.splitlines(keepends=True)[:2])
    assert learn.logger is print


def test_a_table_without_a_recorder_is_empty():
    learn = learner(default_cbs=False, cbs=ll.ProgressCallback())
    assert written(lambda: learn.fit(1)) == ""


# In a terminal


class Terminal:
    """What was written to a pseudo terminal, and what its screen shows."""

    def __init__(self, cols):
        self.cols, self.text = cols, ""

    @property
    def screen(self):
        """The lines that are to be seen at the end."""
        lines, col = [[]], 0
        for character in self.text:
            if character == "\n":
                lines.append([])
            elif character == "\r":
                col = 0
            else:
                if col == self.cols:  # a line that is too long goes on below
                    lines.append([])
                    col = 0
                lines[-1] += [" "] * (col + 1 - len(lines[-1]))
                lines[-1][col] = character
                col += 1
        shown = ["".join(line).rstrip() for line in lines]
        return shown[:-1] if not shown[-1] else shown

    @property
    def bars(self):
        """Every drawing of a bar, one after the other."""
        return [part.rstrip() for part in self.text.split("\r") if "|" in part]


@contextmanager
def terminal(monkeypatch, cols=80):
    """Standard output is a terminal inside."""
    pty = pytest.importorskip("pty")
    monkeypatch.setenv("COLUMNS", str(cols))
    reading, writing = pty.openpty()
    shown, chunks = Terminal(cols), []

    def read():
        while True:
            try:
                chunk = os.read(reading, 65536)
            except OSError:  # the other end was closed
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(writing, "w", encoding="utf-8") as out, redirect_stdout(out):
            yield shown
    finally:
        reader.join()
        os.close(reading)
        shown.text = b"".join(chunks).decode()


@pytest.fixture
def unthrottled(monkeypatch):
    """The bar is drawn after every batch."""
    monkeypatch.setattr(progress, "DRAW_EVERY", 0.0)


def test_the_terminal_shows_the_same_table_and_no_bar_at_the_end(monkeypatch, unthrottled):
    with terminal(monkeypatch) as shown:
        learner().fit(2)
    assert shown.screen == TABLE.splitlines()


def test_a_bar_is_drawn_for_each_phase_with_the_smoothed_loss(monkeypatch, unthrottled):
    with terminal(monkeypatch) as shown:
        learner().fit(2)
    pattern = r"(Epoch \d/2 :) \|[█-]+\| ([\d.]+%) \[(\d/\d) \d\d:\d\d<[\d:?]+(\.\.\. [\d.]+)?\]"
    assert [re.fullmatch(pattern, bar).groups() for bar in shown.bars[:8]] == [
        ("Epoch 1/2 :", "0.00%", "0/3", None),
        ("Epoch 1/2 :", "33.33%", "1/3", "... 1.3450"),
        ("Epoch 1/2 :", "66.67%", "2/3", "... 1.8237"),
        ("Epoch 1/2 :", "66.67%", "2/3", "... 2.1431"),
        ("Epoch 1/2 :", "0.00%", "0/3", None),
        ("Epoch 1/2 :", "33.33%", "1/3", None),
        ("Epoch 1/2 :", "66.67%", "2/3", None),
        ("Epoch 1/2 :", "66.67%", "2/3", None),
    ]
    assert {bar[:11] for bar in shown.bars[8:]} == {"Epoch 2/2 :"}


def test_the_bar_says_which_named_set_is_validated(monkeypatch, unthrottled):
    with terminal(monkeypatch) as shown:
        learn = learner()
        loader = learn.dls.valid
        learn.dls = ll.DataLoaders(loader, loader, {"noisy": loader}, device="cpu")
        learn.fit(1)
    comments = [re.search(r"(\.\.\. (\w+))?\]", bar).group(2) for bar in shown.bars]
    assert comments[4:] == [None] * 4 + ["noisy"] * 4


@pytest.mark.parametrize("cols", [20, 40, 60, 80, 200])
def test_a_bar_stays_on_one_line_of_any_terminal(monkeypatch, unthrottled, cols):
    with terminal(monkeypatch, cols) as shown, (learn := learner()).no_logging():
        learn.fit(2)
    assert shown.bars or cols < 40
    assert shown.screen == []


def test_a_shorter_text_covers_a_longer_one(monkeypatch, unthrottled):
    with terminal(monkeypatch) as shown:
        learn = learner(ll.Callback(after_batch=lambda cb: frames.append(None)))
        frames = []
        learn.loss_func = lambda pred, y: ((pred - y) ** 2).mean() * (1000.0 if not frames else 0.001)
        learn.fit(1)
    lengths = [len(part) for part in shown.text.split("\r") if "|" in part and "..." in part]
    assert lengths == sorted(lengths)


def test_the_bar_counts_updates_where_the_fit_does(monkeypatch, unthrottled):
    with terminal(monkeypatch) as shown:
        learner().fit(n_step=5, valid_every=4)
    counts = [re.search(r"(Epoch \d/\d) .*\[(\d/\d)", bar).groups() for bar in shown.bars]
    assert [n for epoch, n in counts if epoch == "Epoch 1/2"][:5] == ["0/4", "1/4", "2/4", "3/4", "3/4"]
    assert [n for epoch, n in counts if epoch == "Epoch 2/2"][:2] == ["0/1", "0/1"]


def test_a_loader_without_length_has_a_bar_that_counts(monkeypatch, unthrottled):
    class NoLength:
        def __iter__(self):
            x, y = line(4)
            return iter([(x, y)] * 2)

    with terminal(monkeypatch) as shown:
        learn = learner()
        learn.dls = ll.DataLoaders(NoLength(), device="cpu")
        learn.fit(1)
    assert [re.search(r"\[(\S+) ", bar).group(1) for bar in shown.bars] == ["0/?", "1/?", "2/?"]
    assert len(shown.screen) == 2


def test_the_bar_is_drawn_ten_times_a_second_at_most(monkeypatch):
    with terminal(monkeypatch) as shown:
        learn = learner(ll.Callback(after_batch=lambda cb: time.sleep(0.004)), n_batch=60)
        began = time.perf_counter()
        learn.fit(2)
        seconds = time.perf_counter() - began
    assert 3 <= len(shown.bars) <= seconds * 10 + 1


def test_quick_epochs_do_not_draw_more_often(monkeypatch):
    with terminal(monkeypatch) as shown:
        began = time.perf_counter()
        learner().fit(30)
        seconds = time.perf_counter() - began
    assert len(shown.bars) <= seconds * 5 + 1
    assert len(shown.screen) == 31


def test_a_quick_validation_draws_nothing(monkeypatch):
    monkeypatch.setattr(progress, "DRAW_EVERY", 60.0)  # quick: quicker than this
    with terminal(monkeypatch) as shown:
        learner().validate()
    assert shown.text == ""


def test_the_bar_of_a_slow_validation_is_gone_at_its_end(monkeypatch):
    with terminal(monkeypatch) as shown:
        learner(ll.Callback(after_batch=lambda cb: time.sleep(0.12))).validate()
    assert shown.bars
    assert shown.screen == []


def test_a_validation_inside_a_training_leaves_the_bar_of_the_training(monkeypatch, unthrottled):
    nested = ll.Callback(after_batch=lambda cb: cb.training and cb.learn.validate())
    with terminal(monkeypatch) as shown:
        learner(nested).fit(1)
    training = [re.search(r"\[(\d/\d)", bar).group(1) for bar in shown.bars][:4]
    assert training == ["0/3", "1/3", "2/3", "2/3"]
    assert shown.screen == TABLE.splitlines()[:2]


@pytest.mark.parametrize("how", ["no_mbar", "no_bar", "no_logging"])
def test_what_is_switched_off_in_a_terminal(monkeypatch, unthrottled, how):
    with terminal(monkeypatch) as shown:
        learn = learner()
        with getattr(learn, how)():
            learn.fit(1)
    has_rows = any(row.startswith("0     ") for row in shown.screen)
    has_epoch = any("Epoch" in bar for bar in shown.bars)
    assert (has_rows, bool(shown.bars), has_epoch) == {
        "no_mbar": (True, True, False),
        "no_bar": (False, False, False),
        "no_logging": (False, True, True),
    }[how]


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("before_fit", ll.CancelFitException),
        ("before_epoch", ll.CancelEpochException),
        ("before_train", ll.CancelTrainException),
        ("before_train", ll.CancelFitException),
        ("before_batch", ll.CancelEpochException),
        ("before_validate", ll.CancelValidException),
        ("after_validate", ll.CancelEpochException),
    ],
)
@pytest.mark.parametrize("order", [0, 99])
def test_a_cancel_leaves_no_bar_and_no_broken_table(monkeypatch, unthrottled, event, error, order):
    cancel = raises(event, error)
    cancel.order = order
    with terminal(monkeypatch) as shown:
        learn = learner(cancel)
        learn.fit(2)
        assert learn.logger is print
    assert all(re.match(r"(epoch|\d)     ", row) for row in shown.screen)


@pytest.mark.parametrize("event", ["before_train", "after_loss", "before_validate"])
def test_an_error_leaves_no_bar(monkeypatch, unthrottled, event):
    with terminal(monkeypatch) as shown, pytest.raises(ZeroDivisionError):
        learner(raises(event, ZeroDivisionError(), epoch=1)).fit(2)
    assert shown.screen == TABLE.splitlines()[:2]


def test_an_empty_fit_in_a_terminal_warns_of_nothing(monkeypatch, recwarn):
    with terminal(monkeypatch) as shown:
        learner().fit(0)
    assert shown.screen == TABLE.splitlines()[:1]
    assert not recwarn.list


# In a notebook

CELLS = [
    """
    import sys
    sys.path.insert(0, "tests/callbacks")
    import learnloop as ll
    from learnloop.callbacks import progress
from learnloop.callbacks.progress import waiting_line
    from test_progress import learner, raises
    progress.DRAW_EVERY = 0.0
    learn = learner()
    """,
    "learn.fit(2)",
    "learn.validate();",
    "try: learner(raises('after_loss', ZeroDivisionError(), epoch=1)).fit(2)\nexcept ZeroDivisionError: pass",
    "with learn.no_logging(): learn.fit(1)",
    "with learner().no_mbar() as other: other.fit(2)",
]


@pytest.fixture(scope="module")
def outputs():
    """The outputs of each cell, executed in a kernel."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    sources = ["\n".join(line.strip() for line in cell.strip().splitlines()) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(ROOT)}}).execute()
    return [cell.outputs for cell in notebook.cells]


def html_of(cell_outputs):
    """What a cell shows as HTML, without the styles that come once."""
    pages = [output["data"]["text/html"] for output in cell_outputs if output.output_type == "display_data"]
    return [page for page in pages if "<style>" not in page]


def rows_of(page):
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_a_notebook_shows_one_table_and_no_bar_at_the_end(outputs):
    (page,) = html_of(outputs[1])
    assert rows_of(page) == [line.split() for line in TABLE.splitlines()]
    assert "<progress" not in page


def test_a_validation_leaves_nothing_in_a_notebook(outputs):
    assert "".join(html_of(outputs[2])) == ""


def test_an_error_in_a_notebook_leaves_the_rows_that_were_done(outputs):
    (page,) = html_of(outputs[3])
    assert rows_of(page) == [line.split() for line in TABLE.splitlines()[:2]]
    assert "<progress" not in page


def test_a_notebook_shows_no_rows_where_logging_is_off(outputs):
    (page,) = html_of(outputs[4])
    assert rows_of(page) == []
    assert "<progress" not in page


def test_without_the_bar_over_epochs_a_notebook_shows_plain_lines(outputs):
    assert "".join(output.text for output in outputs[5] if output.output_type == "stream") == TABLE
    assert "".join(html_of(outputs[5])) == ""


# A line where the loader keeps the model waiting


class SlowLoader:
    """Eight batches, each after a wait."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 8

    def __iter__(self):
        for _ in range(8):
            time.sleep(self.seconds)
            yield torch.zeros(2, 1), torch.zeros(2, 1)


def lines_with(loader, capsys, monkeypatch, least):
    monkeypatch.setattr(progress, "LEAST_WAITED", least)
    learn = ll.Learner(ll.DataLoaders(loader, device="cpu"), torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
    learn.fit(2)
    return capsys.readouterr().out.splitlines()


def test_a_line_below_the_table_says_that_the_loader_is_slow(capsys, monkeypatch):
    last = lines_with(SlowLoader(0.01), capsys, monkeypatch, least=0.1)[-1]
    assert last.startswith("The loader took ") and last.endswith("`learn.profile()` shows the rest.")
    assert 40 < int(last.split()[3].rstrip("%")) <= 100


def test_there_is_no_such_line_where_little_time_is_lost_or_the_loader_is_quick(capsys, monkeypatch):
    assert "The loader" not in lines_with(SlowLoader(0.01), capsys, monkeypatch, least=60.0)[-1]
    batches = [(torch.zeros(2, 1), torch.zeros(2, 1))] * 8
    assert "The loader" not in lines_with(batches, capsys, monkeypatch, least=0.0)[-1]


def test_what_is_said_depends_on_the_loader():
    waits = [(3.0, 4.0, 8), (2.0, 6.0, 8)]  # half of the time, 5 seconds for 16 batches
    loader = torch.utils.data.DataLoader([0])
    advice = "The loader took 50% of the time of training: read in workers (`num_workers=…`);"
    assert waiting_line(waits, 100, loader).startswith(advice)
    assert "more workers" in waiting_line(waits, 100, torch.utils.data.DataLoader([0], num_workers=2))
    assert "read faster" in waiting_line(waits, 100, [])
    assert waiting_line(waits, 6, loader) == ""  # less than two seconds
    assert waiting_line([(1.0, 4.0, 8)], 1000, loader) == ""  # a quarter of the time
    assert waiting_line([], 0, loader) == ""
