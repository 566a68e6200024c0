"""Common sets of callbacks reach what a hand-written loop reaches: benchmarks/common_sets.py in a short form."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("schedulefree")
PATH = Path(__file__).parents[1] / "benchmarks" / "common_sets.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("common_sets", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["common_sets"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    del sys.modules["common_sets"]


def test_there_are_twelve_sets_and_each_names_what_no_other_does(study):
    assert len(study.SETS) == 12
    assert len(set(study.SETS.values())) == 12


@pytest.mark.timeout(300)  # some 3 seconds a training on a quiet machine
@pytest.mark.parametrize(
    "name",
    [
        "fp16, accumulation, clipping, EMA, one cycle",
        "CutMix, momentum, clipping, one cycle",
        "accumulation, MixUp, EMA",
    ],
)
def test_callbacks_reach_what_a_hand_written_loop_reaches(study, name):
    techniques = study.SETS[name]._replace(epochs=3)
    ours, theirs = study.with_callbacks(techniques, seed=0), study.by_hand(techniques, seed=0)
    assert min(ours.accuracy, theirs.accuracy) > 0.9
    assert ours.accuracy == pytest.approx(theirs.accuracy, abs=0.04)  # a seed alone moves it by 0.01
