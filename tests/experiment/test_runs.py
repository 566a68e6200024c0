"""Records of fits, listed and compared."""

import json
import re

import matplotlib
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import learnloop as ll
from learnloop.experiment.runs import Comparison, Runs, read_run
from learnloop.testing import toy_learner


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


@pytest.fixture
def folder(tmp_path):
    """Two fits, the second with an average."""
    learn = toy_learner(n_train=16, n_valid=8, cbs=ll.RunRecord())
    learn.path = tmp_path
    for number, (epochs, cbs) in enumerate(((1, []), (2, [ll.EMA(0.9)]))):
        learn.fit(epochs, cbs=cbs)
        made = next(path for path in (tmp_path / "runs").iterdir() if not path.name.startswith("run-"))
        text = made.read_text().replace(made.stem, f"run-{number}")
        text = re.sub(r'"at": "[^"]*"', f'"at": "2026-01-0{number + 1}T00:00:00+00:00"', text)
        made.rename(made.with_name(f"run-{number}.jsonl")).write_text(text)
    return tmp_path / "runs"


def test_runs_are_listed_newest_first(folder):
    found = ll.runs(folder)
    assert isinstance(found, Runs)
    assert [(run.id, run.how, len(run.history)) for run in found] == [("run-1", "done", 2), ("run-0", "done", 1)]
    assert found[0].last == pytest.approx({"train_loss": 1.42, "valid_loss": 0.9}, abs=0.3)


def test_the_list_is_a_table(folder):
    head, first, second = str(ll.runs(folder)).splitlines()
    assert head.split() == ["run", "model", "callbacks", "epochs", "last", "row", "end", "time"]
    assert re.match(r"run-1  Sequential  EMA +2 +train_loss \d\.\d+, valid_loss \d\.\d+  done  \d\.\d s", first)
    assert second.startswith("run-0")
    assert "<td>EMA</td>" in ll.runs(folder)._repr_html_()


def test_a_run_shows_its_settings(folder):
    run = ll.runs(folder)[0]
    assert run.settings["callbacks.EMA.decay"] == 0.9 and run.settings["data.train.samples"] == 16
    assert "callbacks.EMA.decay  0.9" in str(run)
    assert "<td>callbacks.EMA.decay</td><td>0.9</td>" in run._repr_html_()


def test_a_run_that_was_killed_is_there_without_an_end(folder):
    path = folder / "run-1.jsonl"
    path.write_text("\n".join([*path.read_text().splitlines()[:2], '{"kind": "row", "epo']))
    run = ll.runs(folder)[0]
    assert (run.how, run.seconds, len(run.history)) == (None, None, 1)
    assert "none" in str(ll.runs(folder))


def test_files_without_a_run_are_named(folder):
    (folder / "other.jsonl").write_text(json.dumps({"kind": "study"}))
    (folder / "empty.jsonl").touch()
    found = ll.runs(folder)
    assert len(found) == 2 and [path.name for path in found.damaged] == ["empty.jsonl", "other.jsonl"]
    assert str(found).splitlines()[-1] == "other.jsonl holds no run"


def test_what_a_run_shows_is_escaped(folder):
    path = folder / "run-1.jsonl"
    path.write_text(path.read_text().replace('"Sequential"', '"<script>"'))
    for text in (ll.runs(folder)._repr_html_(), ll.runs(folder)[0]._repr_html_()):
        assert "<script>" not in text and "&lt;script&gt;" in text


def test_an_empty_folder_has_no_runs(tmp_path):
    assert str(ll.runs(tmp_path)) == "no runs"


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*A fit with `cbs=RunRecord\("):
        ll.runs(tmp_path / "no")


# Beside each other


def test_settings_that_differ_and_results_stand_beside_each_other(folder):
    found = ll.compare(ll.runs(folder))
    assert isinstance(found, Comparison)
    assert found.settings["configuration.n_epoch"] == [2, 1]
    assert found.settings["callbacks.EMA.decay"] == [0.9, None]
    assert "configuration.model" not in found.settings and "data.train.checksum" not in found.settings
    assert found.results["epochs"] == [2, 1] and found.results["end"] == ["done", "done"]
    text = str(found).splitlines()
    assert text[0].split() == ["run-1", "run-0"]
    assert any(line.split() == ["callbacks.EMA.decay", "0.9"] for line in text)
    assert "<th>run-1</th><th>run-0</th>" in found._repr_html_()


def test_curves_lie_over_each_other(folder):
    (ax,) = ll.compare(ll.runs(folder)).plot("valid_loss").axes
    assert [(line.get_label(), len(line.get_xdata())) for line in ax.lines] == [("run-1", 2), ("run-0", 1)]


def test_runs_may_be_files(folder):
    assert ll.compare([folder / "run-0.jsonl", str(folder / "run-1.jsonl")]).results["epochs"] == [1, 2]
    assert read_run(folder / "run-0.jsonl").id == "run-0"


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([], ValueError, "`compare` got 0 run; pass two or more"),
        ([3, 4], TypeError, "`compare` takes runs or their files, and got a int"),
        ([__file__, __file__], ValueError, "holds no run: a RunRecord writes one"),
    ],
)
def test_what_are_no_runs_is_refused(runs, error, message):
    with pytest.raises(error, match=message):
        ll.compare(runs)
