"""The lessons in nbs/ run as they are, quickly and anywhere, and are kept with their outputs."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request):
    return nbformat.read(request.param, 4)


def outputs_of(lesson):
    return [(cell, output) for cell in lesson.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_lessons_are_these():
    assert [path.stem for path in LESSONS] == [
        "01_first_fit",
        "02_the_loop_event_by_event",
        "03_write_a_callback",
        "04_schedules_and_the_finder",
        "05_any_batch_any_model",
        "06_groups_and_fine_tuning",
        "07_two_optimizers",
        "10_looking_inside",
    ]


@pytest.mark.timeout(60)  # a lesson takes some 5 seconds on a quiet machine
def test_a_lesson_runs_in_an_empty_folder_and_leaves_it_empty(lesson, tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNLOOP_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several threads wait for each other where tests share the cores
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    nbclient.NotebookClient(lesson, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [output for _, output in outputs_of(lesson) if output.output_type == "error"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_lesson_is_kept_as_one_run_from_top_to_bottom(lesson):
    counts = [cell.execution_count for cell in lesson.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs_of(lesson)


def test_the_kept_outputs_show_no_error_no_warning_and_no_folder_of_some_machine(lesson):
    for cell, output in outputs_of(lesson):
        assert output.output_type != "error", cell.source
        assert output.get("name") != "stderr", cell.source
        texts = [v for k, v in output.get("data", {}).items() if k.startswith("text/")] + [output.get("text", "")]
        assert not any(place in text for text in texts for place in ("/tmp/", "/home/", "/root/", "site-packages"))


def test_a_lesson_leads_to_lessons_that_are_there(lesson):
    for cell in lesson.cells:
        if cell.cell_type == "markdown":
            for name in (part.split(")")[0] for part in cell.source.split("](")[1:]):
                assert (ROOT / "nbs" / name).is_file() or name.startswith("http")
