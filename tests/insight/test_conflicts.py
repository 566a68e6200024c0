"""Where two callbacks get into each other's way, and where a law or a phase keeps them apart."""

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop import Callback
from learnloop.insight.conflicts import Conflict, span_of
from learnloop.testing import toy_learner
from tests.toys import Noise, Shrink


def conflicts(*cbs):
    return list(toy_learner(cbs=cbs, default_cbs=False).dry_run().conflicts)


def test_two_that_write_the_same_at_one_event_are_a_conflict():
    assert conflicts(Noise(), Shrink()) == [Conflict("both write", "xb", "Noise", "Shrink", "before_batch")]


def test_a_law_settles_a_conflict():
    class Settled(Shrink):
        run_after = Noise

    assert conflicts(Noise(), Settled()) == []


def test_two_in_different_phases_are_none():
    class InValidation(Shrink):
        run_train = False

    assert conflicts(Noise(), InValidation()) == []


def test_a_reader_before_its_writer_is_a_conflict():
    reader = Callback(before_batch=lambda cb: cb.x.mean())
    assert conflicts(reader, Noise()) == [Conflict("reads before", "xb", "Callback", "Noise", "before_batch")]


def test_a_reader_after_its_writer_is_none():
    reader = Callback(before_batch=lambda cb: cb.x.mean())
    reader.order = 6
    assert conflicts(reader, Noise()) == []


class Swapped(Callback):
    """Holds another loss function during the training phase."""

    def before_train(self):
        self.former, self.learn.loss_func = self.loss_func, nn.L1Loss()

    def after_train(self):
        self.learn.loss_func = self.former


def test_what_is_put_back_takes_along_what_was_set_meanwhile():
    def sets(cb):
        cb.learn.loss_func = nn.SmoothL1Loss()

    assert conflicts(Swapped(), Callback(before_batch=sets)) == [
        Conflict("puts back", "loss_func", "Callback", "Swapped", "after_train")
    ]


def test_two_that_draw_random_numbers_do_not_meet():
    draws = [Callback(before_batch=lambda cb: torch.rand(1)) for _ in range(2)]
    assert conflicts(*draws) == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("both write", "A and B both write xb in before_batch; B comes last"),
        ("reads before", "A reads xb in before_batch before B writes it"),
        ("puts back", "B puts xb back in before_batch, and so undoes what A writes"),
    ],
)
def test_a_conflict_is_a_sentence(kind, text):
    assert str(Conflict(kind, "xb", "A", "B", "before_batch")) == text


def test_what_a_batch_makes_anew_is_put_back_by_nobody_else():
    class Clears(Callback):
        def before_fit(self):
            self.learn.opt.zero_grad()

        def cleanup_fit(self):
            self.learn.opt.zero_grad()

    def clips(cb):
        nn.utils.clip_grad_norm_(cb.model.parameters(), 1.0)

    assert conflicts(Clears(), Callback(before_step=clips)) == []


def test_averages_and_best_weights_meet_at_the_end(tmp_path):
    learn = toy_learner(cbs=[ll.EMA(), ll.SaveModelCallback()], path=tmp_path)
    assert list(learn.dry_run().conflicts) == [
        Conflict("both write", "parameters", "EMA", "SaveModelCallback", "after_fit")
    ]


def test_an_event_belongs_to_a_span():
    events = ("after_pred", "after_loss", "cleanup_step", "after_cancel_validate", "before_fit")
    assert [span_of(event) for event in events] == ["batch", "batch", "step", "validate", "fit"]
