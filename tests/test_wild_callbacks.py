"""Callbacks written for fastai run here after their import lines are changed, and come to the same numbers.

tests/data/wild_callbacks.py holds them as they run with fastai; tests/data/wild_numbers.json what they come to there.
"""

import json
from pathlib import Path

import pytest
import torch

from learnloop import DataLoaders, TensorLoader

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "wild_numbers.json").read_text())
FASTAI = GOLDEN["scenes"]
THEIRS = "from fastai.basics import *\nfrom fastai.callback.all import *\n"
OURS = "from learnloop.all import *\n"

#: Scene -> what differs on purpose: (fastai's, ours, reason).
DIFFERENCES = {
    "short epochs": {
        "losses": (
            [1.507817, 1.41881],
            [1.507817, 1.537895, 1.467731, 1.438989],
            "fastai's Recorder does not hear of the batch in which the training is cancelled; here the loop counts it",
        ),
        "lrs": ([0.1, 0.1], [0.1, 0.1, 0.1, 0.1], "the same"),
        "values": (
            [[1.202284, 0.4444444], [1.034576, 0.4444444]],
            [[None, 1.202284, 0.4444444], [None, 1.034576, 0.4444444]],
            "a cancelled training has no loss; fastai moves the other columns to its place",
        ),
    },
}


@pytest.fixture(scope="module")
def wild():
    """What wild_callbacks.py defines, with our import line; on one thread, since networks this small only wait."""
    source = (DATA / "wild_callbacks.py").read_text()
    assert source.count(THEIRS) == 1
    defined = {"__name__": "wild_callbacks"}
    exec(compile(source.replace(THEIRS, OURS), "wild_callbacks.py", "exec"), defined)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield defined
    torch.set_num_threads(n_threads)


def ours(wild, name):
    """The numbers of a scene here."""
    train, valid = (TensorLoader(wild[x], wild[y], bs=6) for x, y in (("X", "Y"), ("X_VALID", "Y_VALID")))
    return wild["numbers"](wild["SCENES"][name], DataLoaders(train, valid, device="cpu"))


def close(value):
    """To compare nested numbers with: float32 sums in another order differ in the sixth digit."""
    if isinstance(value, dict):
        return {k: close(v) for k, v in value.items()}
    if isinstance(value, list):
        return [close(v) for v in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value


def test_the_numbers_cover_every_scene(wild):
    assert GOLDEN["fastai"] == "2.8.12"
    assert list(FASTAI) == list(wild["SCENES"])


@pytest.mark.parametrize("name", FASTAI)
def test_a_callback_written_for_fastai_comes_to_the_same_numbers_but_for_the_listed_differences(wild, name, recwarn):
    different = {key: here for key, (_, here, _) in DIFFERENCES.get(name, {}).items()}
    assert ours(wild, name) == close({**FASTAI[name], **different})
    assert [str(w.message) for w in recwarn] == []


def test_every_listed_difference_is_one_and_has_a_reason():
    for name, differences in DIFFERENCES.items():
        for key, (there, here, reason) in differences.items():
            assert FASTAI[name][key] == there != here and reason


def test_a_scene_without_callbacks_comes_to_other_numbers_than_each_of_them():
    """Else a callback that never ran would pass."""
    same = [name for name, numbers in FASTAI.items() if numbers["weights"] == FASTAI["nothing"]["weights"]]
    assert same == ["nothing", "class scores"]  # that one watches only
