"""docs/callbacks.md says what the callbacks are now."""

import importlib.util
from pathlib import Path

import pytest

import learnloop as ll

pytest.importorskip("schedulefree")
PATH = Path(__file__).parents[1] / "docs" / "make_callbacks.py"


@pytest.fixture(scope="module")
def maker():
    """The script that writes the page, as a module."""
    spec = importlib.util.spec_from_file_location("make_callbacks", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # a fit with every pair of callbacks: half a minute, more where the cores are shared
@pytest.mark.timeout(600)
def test_the_page_is_what_its_script_writes_now(maker):
    assert maker.PAGE.read_text() == maker.page(), "run `python docs/make_callbacks.py`"


def test_the_page_names_every_callback_with_its_events_and_order(maker):
    text = maker.PAGE.read_text()
    for name, cls in maker.callbacks().items():
        if cls is not ll.Callback:
            row = next(line for line in text.splitlines() if line.startswith(f"| **{name}**"))
            assert f"| {cls.order:g} |" in row and maker.doc_of(cls).replace("|", "\\|") in row
            assert row.rstrip(" |").endswith(" ".join(f"`{event}`" for event in maker.events_of(cls)))


def test_a_row_says_what_a_class_is(maker):
    assert maker.doc_of(ll.GradientClip).startswith("Before each step clamps every gradient")
    assert maker.events_of(ll.SaveModelCallback) == ["before_fit", "after_step", "after_epoch", "after_fit"]
    assert maker.laws_of(ll.GradientClip) == "after GradientAccumulation, MixedPrecision"
    assert maker.laws_of(ll.GradientAccumulation) == "before MixedPrecision, GradientClip"
    assert maker.laws_of(ll.EMA) == ""
    assert (maker.tasks_of(ll.GradientClip), maker.tasks_of(ll.FreezeUntil)) == ("all", "fit, lr_find")
    assert maker.cost_of([230.9, 369.7]) == "231, 370"
    assert maker.cost_of([-0.8]) == "~0"


def test_what_a_fit_refuses_beside_another_is_found_by_trying(maker):
    assert not maker._goes_with("EMA", "SWA")
    assert not maker._goes_with("MixUp", "MixUp")
    assert maker._goes_with("EMA", "MixUp")
