"""What an error says besides itself: tests/loop/test_dispatch.py and test_spans.py see it in the loop."""

import pytest
from torch.utils.data import DataLoader, Dataset

from learnloop import DataLoaders
from learnloop.loop.callback import Callback
from learnloop.loop.cancel import CancelFitException
from learnloop.loop.notes import add_note, first_of, in_cleanup
from tests.toys import learner, raise_at, raising, tensor_loader


def notes_of(kind, *cbs, dls=None):
    """The notes on the error that ends a fit."""
    with pytest.raises(kind) as caught:
        learner(cbs, dls).fit(1)
    return caught.value.__notes__


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


def test_a_cancel_in_a_cleanup_becomes_an_error_that_names_the_event_for_it():
    learn, cancel = learner(), CancelFitException("mine")
    error = in_cleanup(cancel, learn, "Clip.cleanup_batch")
    assert type(error) is RuntimeError and error.__cause__ is cancel
    assert str(error) == (
        "CancelFitException was raised in `Clip.cleanup_batch`: a cleanup cannot cancel. Use `after_batch`."
    )
    assert error.__notes__ == ["raised by Clip.cleanup_batch"]


def test_an_error_in_a_cleanup_gets_a_note_and_an_interrupt_none():
    learn, error, interrupt = learner(), ValueError("x"), KeyboardInterrupt()
    assert in_cleanup(error, learn, "Clip.cleanup_batch") is error
    assert in_cleanup(interrupt, learn, "Clip.cleanup_batch") is interrupt
    assert error.__notes__ == ["raised by Clip.cleanup_batch"] and not hasattr(interrupt, "__notes__")


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


@pytest.mark.parametrize(("bs", "numbers"), [(8, "0, 1, 2, 3, 4, 5, 6, 7"), (9, "0, 1, 2, 3, 4, 5, 6, 7, … (9)")])
def test_of_the_samples_in_a_batch_the_first_eight_are_told(bs, numbers):
    dls = DataLoaders(tensor_loader(1, bs), device="cpu")
    assert notes_of(ValueError, raise_at("after_pred", ValueError("x")), dls=dls) == [
        "raised by Once.after_pred at epoch 0, batch 0, train\n"
        f"  xb: (float32[{bs}, 1] cpu)\n"
        f"  yb: (float32[{bs}, 1] cpu)\n"
        f"  pred: float32[{bs}, 1] cpu\n"
        f"  samples: {numbers}"
    ]


class Points(Dataset):
    """Points of a line, of which one cannot be read."""

    def __init__(self, unreadable):
        self.points, self.unreadable = next(iter(tensor_loader(1, 6))), unreadable

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i == self.unreadable:
            raise LookupError(f"no point {i}")
        return self.points[0][i], self.points[1][i]


@pytest.mark.parametrize(
    ("unreadable", "number", "samples"), [(1, 0, "0, 1"), (2, 1, "2, 3"), (5, 2, "4, 5")], ids=["first", "next", "last"]
)
def test_of_a_batch_that_cannot_be_read_number_and_samples_are_told(unreadable, number, samples):
    assert notes_of(LookupError, dls=DataLoaders(DataLoader(Points(unreadable), 2), device="cpu")) == [
        f"raised by the training loader, on its way to the next batch, number {number} of epoch 0, train\n"
        f"  waiting for samples: {samples}"
    ]


class Breaks:
    """A loader that fails on its way to the first batch."""

    def __init__(self, error, **settings):
        self.error = error
        vars(self).update(settings)

    def __iter__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "settings", "is_told"),
    [
        (ConnectionResetError("by peer"), {"num_workers": 2}, True),
        (EOFError("Ran out of input"), {"num_workers": 2}, True),
        (EOFError("Caught EOFError in DataLoader worker process 0."), {"num_workers": 2}, False),
        (ValueError("mine"), {"num_workers": 2}, False),
        (EOFError("no bytes"), {"num_workers": 0}, False),
        (EOFError("no bytes"), {}, False),
    ],
    ids=["reset", "cut short", "the worker's own", "an error", "no worker", "no torch loader"],
)
def test_where_the_line_to_a_worker_breaks_it_is_told_that_the_worker_died(error, settings, is_told):
    notes = notes_of(type(error), dls=DataLoaders(Breaks(error, **settings), device="cpu"))
    last = "\n  a data worker died while it handed over a batch" if is_told else ""
    assert notes == [f"raised by the training loader, on its way to the next batch, number 0 of epoch 0, train{last}"]


def test_a_dead_worker_that_torch_reports_in_the_middle_of_a_batch_is_not_blamed_on_who_runs():
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert notes_of(RuntimeError, raise_at("after_pred", died)) == [
        "raised by a data worker that died, noticed at epoch 0, batch 0, train"
    ]


def test_a_loader_that_cannot_say_its_samples_does_not_replace_the_error():
    class Broken:
        def __iter__(self):
            return iter(tensor_loader(2))

        def keyed_indices(self, key):
            raise OSError("nobody knows")

    assert notes_of(ValueError, raise_at("after_pred", ValueError("x")), dls=DataLoaders(Broken(), device="cpu")) == [
        "raised by Once.after_pred at epoch 0, batch 0, train\n"
        "  xb: (float32[2, 1] cpu)\n"
        "  yb: (float32[2, 1] cpu)\n"
        "  pred: float32[2, 1] cpu"
    ]


@pytest.mark.parametrize(("name", "told"), [("valid", ""), ("noisy", " of `noisy`")])
def test_of_a_validation_with_a_name_of_its_own_the_name_is_told(name, told):
    learn = learner(dls=DataLoaders(tensor_loader(2), {name: tensor_loader(1)}, device="cpu"))
    with pytest.raises(ValueError) as caught:
        learn.fit(1, cbs=Callback(before_validate=raising(ValueError("x"))))
    assert caught.value.__notes__ == [f"raised by Callback.before_validate at epoch 0, validate{told}"]
