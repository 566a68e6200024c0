"""examples/fashion_mnist.py runs from top to bottom; how far it comes is in the README."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import learnloop as ll

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "fashion_mnist.py"


def run(*args, **kwargs):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *args], env=env, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def needs_data():
    try:
        ll.datasets.fashion_mnist(download=False)
    except FileNotFoundError:
        pytest.skip("needs Fashion-MNIST: apt-get install dataset-fashion-mnist")


@pytest.mark.timeout(300)  # most of it is the validation set: 15 seconds on a quiet machine
@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_a_short_run_trains_and_says_how_far_it_came(precision, tmp_path):
    done = run("--epochs", "1", "--n", "2560", *precision, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert (last[0], last[2:6]) == ("accuracy", ["after", "1", "epochs", "in"])
    assert float(last[1]) > 0.4


def test_two_precisions_at_once_are_refused():
    assert "not allowed with argument" in run("--fp16", "--bf16").stderr
