"""What an error says besides itself: tests/loop/test_dispatch.py and test_spans.py see it in the loop."""

import pytest

from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelFitException
from learnloop.loop.notes import add_note, first_of
from tests.toys import learner, raising


def test_after_a_run_a_note_has_no_place():
    learn, error = learner(), ValueError("x")
    learn.fit(1)
    add_note(error, learn, "Clip.before_batch")
    assert error.__notes__ == ["raised by Clip.before_batch"]


def test_the_first_error_leaves_with_the_others_as_notes():
    first, second = ValueError("one"), KeyError("two")
    assert first_of([first, second]) is first
    assert first.__notes__ == ["also raised: KeyError: 'two'"]


def test_a_keyboard_interrupt_wins_over_an_earlier_error():
    error, interrupt = ValueError("one"), KeyboardInterrupt()
    assert first_of([interrupt], error) is interrupt
    assert interrupt.__notes__ == ["also raised: ValueError: one"]


def test_a_cancel_on_its_way_gives_way_to_an_error():
    error = ValueError("one")
    assert first_of([error], CancelFitException()) is error


def test_a_cancel_in_a_cleanup_of_a_callback_that_is_removed_is_an_error_and_the_next_one_its_note():
    bad = Callback(cleanup_batch=raising(CancelFitException), cleanup_fit=raising(ValueError("lost?")))
    learn = learner([bad, Callback(after_pred=lambda cb: cb.learn.remove_cb(bad))])
    with pytest.raises(RuntimeError, match="a cleanup cannot cancel") as caught:
        learn.fit(1)
    assert any("ValueError: lost?" in note for note in caught.value.__notes__)
    assert bad.learn is None


@pytest.mark.parametrize(
    ("event", "place"),
    [
        ("before_fit", ""),
        ("before_epoch", " at epoch 0"),
        ("before_train", " at epoch 0, train"),
        ("after_train", " at epoch 0, batch 1, train"),
        ("before_validate", " at epoch 0, validate"),
        ("after_validate", " at epoch 0, batch 0, validate"),
        ("after_epoch", " at epoch 0"),
        ("after_fit", ""),
    ],
)
def test_a_note_says_as_much_of_the_place_as_the_run_has_come_to(event, place):
    learn = learner()
    learn.fit(1)
    with pytest.raises(ValueError) as caught:
        learn.fit(1, cbs=Callback(**{event: raising(ValueError("x"))}))
    assert caught.value.__notes__ == [f"raised by Callback.{event}{place}"]


def test_of_an_error_in_a_validation_inside_of_training_the_inner_place_is_told():
    learn = learner(
        Callback(after_step=lambda cb: cb.learn.validate(cbs=Callback(before_validate=raising(ValueError("x")))))
    )
    with pytest.raises(ValueError) as caught:
        learn.fit(1)
    assert caught.value.__notes__[0] == "raised by Callback.before_validate at epoch 0, validate"
