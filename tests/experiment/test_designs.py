"""Which arms a design makes of callbacks."""

import pytest

from learnloop.experiment.designs import design_of, interaction_arms


def test_add_one_in_compares_each_callback_with_none():
    found = design_of("add-one-in", ["a", "b"])
    assert (found.reference, found.arms) == ("none", {"none": (), "a": ("a",), "b": ("b",)})


def test_leave_one_out_compares_all_with_all_but_one():
    found = design_of("leave-one-out", ["a", "b", "c"])
    assert found.reference == "all"
    assert found.arms == {
        "all": ("a", "b", "c"),
        "without a": ("b", "c"),
        "without b": ("a", "c"),
        "without c": ("a", "b"),
    }


def test_pairs_has_each_alone_and_every_two_together():
    found = design_of("pairs", ["a", "b", "c"])
    assert list(found.arms) == ["none", "a", "b", "c", "a + b", "a + c", "b + c"]
    assert interaction_arms(found) == {
        "a + b": ("a + b", "a", "b"),
        "a + c": ("a + c", "a", "c"),
        "b + c": ("b + c", "b", "c"),
    }
    assert interaction_arms(design_of("add-one-in", ["a", "b"])) == {}


@pytest.mark.parametrize(
    ("name", "cbs", "message"),
    [
        ("one-by-one", ["a"], "`design='one-by-one'`: pass 'add-one-in', 'leave-one-out' or 'pairs'."),
        ("pairs", ["a"], "`cbs` has 1 callbacks; the design 'pairs' needs 2 or more"),
        ("add-one-in", [], "`cbs` has 0 callbacks; the design 'add-one-in' needs 1 or more"),
        ("add-one-in", ["none"], "`cbs` calls a callback 'none', which is the name of an arm"),
    ],
)
def test_what_makes_no_design_is_refused(name, cbs, message):
    with pytest.raises(ValueError, match=message):
        design_of(name, cbs)
