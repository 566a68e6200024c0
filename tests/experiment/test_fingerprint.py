"""What a training is made of: when it is the same, and when another."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import learnloop as ll
from learnloop.experiment.fingerprint import configuration, described, differences, fingerprint


def plain(n=1):
    return n + 1


def made(constant):
    exec(f"def f():\n    # a comment {constant}\n    return {constant}", namespace := {"__name__": "somewhere"})
    return namespace["f"]


def closing_over(value):
    return lambda: value


def mark(make=plain, cbs=None, fit=("fit", 1), metric=None):
    return fingerprint(configuration(make, {"ema": ll.EMA} if cbs is None else cbs, fit, metric))


def test_the_same_parts_make_the_same_mark():
    assert mark() == mark()
    assert mark(cbs={"ema": partial(ll.EMA, 0.9)}) == mark(cbs={"ema": partial(ll.EMA, 0.9)})
    assert described(made(1)) == described(made(1))


@pytest.mark.parametrize(
    "other",
    [
        {"make": made(1)},
        {"cbs": {"ema": partial(ll.EMA, 0.9)}},
        {"cbs": {"ema": ll.SWA}},
        {"cbs": {}},
        {"fit": ("fit", 2)},
        {"fit": ("fit", 1, {"lr": 0.1})},
        {"metric": "accuracy"},
    ],
)
def test_whatever_changes_makes_another(other):
    assert mark(**other) != mark()


def test_code_closure_and_defaults_count_and_comments_do_not():
    assert described(made(1)) != described(made(2))
    assert described(closing_over(1)) != described(closing_over(2))
    assert described(closing_over(torch.zeros(100))) != described(closing_over(torch.ones(100)))
    assert described(closing_over(torch.zeros(100))) == described(closing_over(torch.zeros(100)))
    before = described(plain)
    plain.__defaults__ = (2,)
    try:
        assert described(plain) != before
    finally:
        plain.__defaults__ = (1,)


def test_functions_that_close_over_each_other_come_to_an_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert described(even)[0].endswith("even")


def test_what_differs_is_named():
    before = configuration(plain, {"ema": ll.EMA, "clip": ll.GradientClip}, ("fit", 1), None)
    now = configuration(plain, {"ema": ll.SWA, "mixup": ll.MixUp}, ("fit", 2), None)
    assert differences(before, now) == ["fit", "`cbs['ema']`", "`cbs['clip']`", "`cbs['mixup']`"]


def test_another_process_makes_the_same_mark():
    code = "from tests.experiment.test_fingerprint import mark; print(mark())"
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    from tests.experiment.test_fingerprint import mark as imported  # under the name that the other process knows

    assert done.stdout.strip() == imported()
