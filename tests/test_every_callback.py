"""Every public callback of the library keeps every promise, alone and beside others."""

import importlib.util
import random
from functools import partial

import pytest
import torch

from learnloop.checks.library import INTEGRATIONS, callbacks, learner_for, made
from learnloop.checks.pairs import all_pairs, check_pair
from learnloop.checks.scenes import HEARD, heard_by
from learnloop.testing import check_callback

pytest.importorskip("schedulefree")
pytestmark = pytest.mark.timeout(600)  # a second each, or many on a machine that does a lot besides

INSTALLED = [name for name, (_, package, _) in INTEGRATIONS.items() if importlib.util.find_spec(package)]
NAMES = [*sorted(callbacks()), *INSTALLED]
#: They start a process of their own for each fit; tests/integrations checks them at fewer events.
SLOW_TO_START = {"MLflowCallback", "WandbCallback"}
#: Where something is raised beside those events that a callback hears itself.
SOME_EVENTS = {"before_fit", "after_loss", "after_cancel_batch", "before_validate", "after_epoch"}
#: Forty pairs, always the same; `make pairs` checks all of them.
PAIRS = random.Random(0).sample(all_pairs(), 40)


@pytest.fixture(autouse=True)
def eager(monkeypatch, tmp_path):
    """Compiling takes a second each time; and integrations write into the working folder."""
    monkeypatch.chdir(tmp_path)
    with torch.compiler.set_stance("force_eager"):
        yield


def check(name, **events):
    return check_callback(partial(made, name), partial(learner_for, [name]), **events)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW_TO_START])
def test_a_callback_keeps_every_promise(name):
    heard = SOME_EVENTS | heard_by([made(name)])
    assert check(name, events=[event for event in HEARD if event in heard]).broken == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_callback_keeps_every_promise_at_every_event(name):
    assert check(name).broken == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_a_pair_works_together_or_is_refused_with_a_reason(names):
    pair = check_pair(*names)
    assert pair.broken == {}
    assert pair.refusal is None or len(pair.refusal) > 40


def test_a_pair_that_cannot_work_together_is_refused():
    assert "Keep one of them" in check_pair("EMA", "SWA").refusal
    assert check_pair("EMA", "GradientClip") == (("EMA", "GradientClip"), None, {})


def test_each_of_two_is_in_a_pair_with_each_and_with_another_of_its_class():
    assert all_pairs(["B", "A"]) == [("A", "A"), ("A", "B"), ("B", "B")]
