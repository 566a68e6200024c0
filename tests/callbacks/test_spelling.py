"""Settings as plain data."""

import json
import threading
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.spelling import arguments_of, spelled


def function():
    """A function of this module."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (0.5, 0.5),
        ("text", "text"),
        (Path("a/b"), "a/b"),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        (torch.zeros(100, dtype=torch.int64), f"Tensor (100,) torch.int64, checksum {zlib.crc32(bytes(800)):08x}"),
        ((1, [2, {3}]), [1, [2, [3]]]),
        ({"a": 1, 2: "b"}, {"a": 1, "2": "b"}),
        (torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]),
        (slice(1e-3), "slice(None, 0.001, None)"),
        (function, f"{__name__}.function"),
        (ll.Adam, "Adam"),
        (partial(ll.SGD, mom=0.9), "SGD(mom=0.9)"),
        (nn.MSELoss(), "torch.nn.modules.loss.MSELoss(reduction='mean')"),
        (np.less, "numpy.less"),
        (ll.AMPMode.FP16, "fp16"),
        (torch.device("cpu"), "cpu"),
        (torch.float16, "torch.float16"),
        (threading.Lock(), "_thread.lock()"),
        (ll.EMA(0.9), "EMA(decay=0.9, warmup=False, apply_at_end=True)"),
    ],
)
def test_every_value_has_a_plain_form(value, expected):
    assert spelled(value) == expected
    json.dumps(spelled(value))


def test_of_a_long_list_there_is_a_beginning_and_a_checksum():
    one, other = spelled(list(range(1000))), spelled([*range(999), 0])
    assert one[:8] == other[:8] == list(range(8))
    assert one[8].startswith("… 1000 in all, checksum ") and one[8] != other[8]


def test_of_an_address_only_the_host_is_kept():
    assert spelled("https://user:secret@hooks.example.com/services/T0/B0/token?key=1") == "https://hooks.example.com/…"
    assert spelled({"uri": "see https://a.example/x"}) == {"uri": "see https://a.example/…"}


def test_what_holds_itself_comes_to_an_end():
    circle = []
    circle.append(circle)
    assert "list" in str(spelled(circle))


def test_arguments_are_those_that_an_object_keeps_under_their_names():
    assert arguments_of(ll.EMA(0.9, warmup=True)) == {"decay": 0.9, "warmup": True, "apply_at_end": True}
    assert arguments_of(ll.TrainEvalCallback()) == {}
    assert arguments_of(3) == {}
