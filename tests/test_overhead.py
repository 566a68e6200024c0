"""The loop stays near a hand-written one: benchmarks/overhead.py in a short form, with room for a busy machine."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timing
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def overhead():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # benchmarks import each other
        yield importlib.import_module("overhead")


@pytest.fixture(scope="module")
def rows(overhead):
    """What a short measurement found, by section and name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = overhead.measure(overhead.comparisons(), rounds=5)
    finally:
        torch.set_num_threads(threads)
    return {(row.section, row.name): row for row in found}


def test_a_training_batch_costs_little_more_than_a_hand_written_one(rows):
    assert rows["train", "learnloop"].ratio < 1.35  # 1.06 on a quiet machine


def test_a_validation_batch_costs_little_more_than_a_hand_written_one(rows):
    assert rows["validate", "learnloop"].ratio < 1.8  # 1.3 on a quiet machine


def test_twenty_more_callbacks_cost_little_more_than_calling_their_handlers(rows):
    more = "20 more callbacks"
    calls = rows[more, "hand-written, calling 120 methods in a `for`"].over
    assert rows[more, f"learnloop, {more}"].over < 4 * max(calls, 5.0)  # twice on a quiet machine


def test_no_tensor_is_brought_to_the_host_per_batch(overhead):
    assert overhead.all_host_reads() == {"learnloop, train": 0.0, "learnloop, validate": 0.0}


def test_a_host_read_in_a_loop_is_counted(overhead):
    def reading(batches):
        return overhead.Loop("reading", lambda: [x.sum().item() for x, _ in batches], batches)

    assert overhead.host_reads(reading) == 1.0


def test_importing_the_package_loads_beside_torch_nothing_that_takes_long():
    late = ("matplotlib", "fastprogress", "numpy.random", "statistics")
    source = "import sys, torch; before = {*sys.modules}; import learnloop; print(*sys.modules.keys() - before)"
    run = subprocess.run(
        [sys.executable, "-c", source], cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True
    )
    assert not {*late}.intersection(run.stdout.split())
