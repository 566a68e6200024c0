"""A step made of steppers costs no more than torch's: benchmarks/optimizers.py in a short form."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timing
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def rows():
    """What a short measurement found, by section and name."""
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("optimizers", BENCHMARKS / "optimizers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["optimizers"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = module.measure(module.comparisons(module.parameters(16, (400, 390)), peers=False), rounds=8)
    finally:
        torch.set_num_threads(threads)
        del sys.modules["optimizers"]
        sys.path.remove(str(BENCHMARKS))
    return {row.name: row for row in found}


@pytest.mark.parametrize("name", ["learnloop `Adam`", "learnloop `SGD`"])
def test_the_fused_forms_cost_less_than_torchs_foreach(rows, name):
    assert rows[name].ratio < 0.9  # 0.2 and 0.6 on a quiet machine


@pytest.mark.parametrize("name", ["learnloop `Adam` of steppers", "learnloop `SGD` of steppers", "learnloop `RAdam`"])
def test_steppers_cost_at_most_little_more_than_torchs_foreach(rows, name):
    assert rows[name].ratio < 1.3  # 0.6, 1.0 and 0.5 on a quiet machine
