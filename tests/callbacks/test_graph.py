"""ShowGraphCallback: what is drawn and where; nothing outside of a notebook."""

import math
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

import learnloop as ll
from learnloop.callbacks.graph import expected_batches, graph, limits
from learnloop.testing import check_callback, toy_learner

ROOT = Path(__file__).resolve().parent.parent.parent


def test_order_and_switches_are_those_of_fastai():
    assert (ll.ShowGraphCallback.order, ll.ShowGraphCallback.run_valid) == (65, False)


def test_its_width_is_that_of_the_whole_training():
    assert expected_batches([4], 2) == 12
    assert expected_batches([4, 8, 11], 0) == 11
    assert expected_batches([0], 0) == 1


def test_its_height_holds_every_loss_that_is_finite():
    assert limits([1.0, 2.0, math.inf, math.nan]) == (0.0, 2.1)
    assert limits([-1.0, 1.0]) == (-1.0, 1.1)
    assert limits([]) == (0.0, 1)


def test_the_graph_is_a_picture():
    seen = []
    look = ll.Callback(after_epoch=lambda cb: seen.append(graph(cb.learn)))
    look.order = 65
    toy_learner(cbs=look).fit(2)
    assert [png[:8] for png in seen] == [b"\x89PNG\r\n\x1a\n"] * 2


IN_A_NOTEBOOK = """
import learnloop as ll
from learnloop.testing import toy_learner

learn = toy_learner(cbs=ll.ShowGraphCallback())
learn.fit(3)
learn.validate()
learn.fit(1)
"""


def test_in_a_notebook_a_fit_has_one_graph_that_is_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(IN_A_NOTEBOOK)])
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    assert [(o.output_type, "image/png" in o.data) for o in outputs] == [("display_data", True)] * 2
    assert outputs[0].data["image/png"] != outputs[1].data["image/png"]


def test_outside_of_a_notebook_it_draws_nothing_and_loads_nothing():
    code = (
        IN_A_NOTEBOOK + "import sys; print([m for m in ('matplotlib', 'IPython', 'fastprogress') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


@pytest.mark.parametrize("left_out", [ll.Recorder, ll.TrainEvalCallback])
def test_it_needs_no_other_callback(left_out):
    learn = toy_learner(cbs=ll.ShowGraphCallback())
    learn.remove_cb(left_out)
    learn.fit(1)


def test_it_keeps_the_promises():
    assert check_callback(ll.ShowGraphCallback).broken == {}
