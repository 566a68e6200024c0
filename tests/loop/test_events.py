"""The list of events, and what is derived from it."""

import pytest

from learnloop import event
from learnloop.loop.events import BATCH_EVENTS, DOCS, EVENTS, FORMER_NAMES, LOOP, one_edit_away, unknown_event
from tests.toys import Heard, learner


def test_the_events_stand_in_firing_order():
    assert tuple(EVENTS) == (
        *("after_create", "before_fit", "before_epoch", "before_train", "before_batch", "after_pred", "after_loss"),
        *("before_backward", "after_cancel_backward", "after_backward", "cleanup_backward"),
        *("before_step", "after_cancel_step", "after_step", "cleanup_step"),
        *("after_cancel_batch", "after_batch", "cleanup_batch"),
        *("after_cancel_train", "after_train", "cleanup_train"),
        *("before_validate", "after_cancel_validate", "after_validate", "cleanup_validate"),
        *("after_cancel_epoch", "after_epoch", "cleanup_epoch", "after_cancel_fit", "after_fit", "cleanup_fit"),
    )


def test_a_fit_fires_them_in_that_order():
    heard = Heard()
    learner(heard).fit(1)
    first_heard = list(dict.fromkeys(heard.events))
    assert first_heard == [name for name in EVENTS if not name.startswith("after_cancel_")]


def test_every_event_knows_how_deep_it_lies():
    depths = {e.name: e.depth for e in LOOP}
    assert depths["after_create"] == depths["before_fit"] == depths["cleanup_fit"] == 0
    assert depths["before_epoch"] == depths["after_cancel_epoch"] == 1
    assert depths["before_train"] == depths["cleanup_validate"] == 2
    assert depths["before_batch"] == depths["after_batch"] == 3
    assert depths["after_pred"] == depths["before_step"] == 4


def test_every_event_is_explained():
    assert all(DOCS[name] for name in EVENTS)
    assert DOCS["after_cancel_batch"] == "the batch was cancelled"


def test_batch_events_are_those_inside_the_batch_span_without_cleanups():
    assert tuple(BATCH_EVENTS) == (
        *("before_batch", "after_pred", "after_loss", "before_backward", "after_cancel_backward", "after_backward"),
        *("before_step", "after_cancel_step", "after_step", "after_cancel_batch", "after_batch"),
    )


def test_event_has_every_event_as_an_attribute_that_equals_its_name():
    assert event.before_batch == "before_batch"
    assert [getattr(event, name) for name in EVENTS] == list(EVENTS)


def test_completion_lists_the_events_and_nothing_else():
    assert dir(event) == sorted(EVENTS)


def test_event_shown_is_the_picture_of_the_loop():
    lines = repr(event).splitlines()
    assert len(lines) == len(EVENTS)
    assert lines[4] == "      before_batch             a batch is split into xb and yb and lies on the device"


def test_a_misspelt_event_fails_with_the_nearest_one():
    with pytest.raises(AttributeError, match=r"`before_bacth` is no event. Did you mean `before_batch`?"):
        event.before_bacth  # noqa: B018


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("after_bacth", "after_batch"),  # two neighbours swapped
        ("fater_fit", "after_fit"),
        ("after_batc", "after_batch"),  # one left out
        ("ater_fit", "after_fit"),
        ("before_batchh", "before_batch"),  # one too many
        ("xbefore_fit", "before_fit"),
        ("before_vatch", "before_batch"),  # one replaced
        ("after_fis", "after_fit"),
        ("after_batches", None),
        ("after_bhcta", None),
        ("after_batch", None),
        ("before_call", None),
        ("", None),
    ],
)
def test_one_edit_away(name, meant):
    assert one_edit_away(name) == meant


def test_no_two_events_are_one_edit_apart():
    assert [name for name in EVENTS if one_edit_away(name)] == []


def test_a_name_like_no_event_is_pointed_to_the_list():
    assert unknown_event("zzz") == "`zzz` is no event. `event.<tab>` lists them."


def test_former_names_are_answered_with_todays():
    assert unknown_event("begin_fit") == "`begin_fit` is an earlier name of an event; today it is `before_fit`."
    assert unknown_event("on_epoch_end") == "`on_epoch_end` is an earlier name of an event; today it is `after_epoch`."
    assert set(FORMER_NAMES.values()) <= set(EVENTS)
    assert not set(FORMER_NAMES) & set(EVENTS)
