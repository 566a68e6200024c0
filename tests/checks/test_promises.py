"""The promises that a check looks at beside cancels, removal and resuming: tests/test_testing.py has those."""

import random
import re

import pytest
import torch

import learnloop as ll
from learnloop.testing import check_callback, toy_learner


def broken(make, make_learner=None):
    """What is broken, by promise."""
    with pytest.raises(AssertionError) as caught:
        check_callback(make, make_learner, events=[])
    return str(caught.value)


class DrawsOnce(ll.Callback):
    """Reads only, as it says; but moves a random generator."""

    reads_only = True

    def before_fit(self):
        random.random()


class MovesWeights(ll.Callback):
    reads_only = True

    def after_step(self):
        with torch.no_grad():
            next(self.model.parameters()).mul_(0.5)


class NextToRecorder(ll.Callback):
    order = ll.Recorder.order

    def after_epoch(self):
        pass


class HalvesLoss(ll.Callback):
    """At the place of another one that adds to the loss: which comes first makes another number."""

    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad / 2


class AddsToLoss(ll.Callback):
    def after_loss(self):
        self.learn.loss_grad = self.learn.loss_grad + next(self.model.parameters()).pow(2).sum()


class FullPrecisionOnly(ll.Callback):
    def after_pred(self):
        if self.learn.pred.dtype is not torch.float32:
            raise ZeroDivisionError("float32 alone")


class RefusesMixedPrecision(ll.Callback):
    def before_fit(self):
        if self.learn._grab_cbs(ll.MixedPrecision):
            raise ValueError("no mixed precision here. Take it away.")


class StepsAlways(ll.Callback):
    """Takes it for granted that a batch ends with a step."""

    def after_batch(self):
        if self.learn.training and not self.learn.stepped:
            raise ZeroDivisionError("no step")


class Reads(ll.Callback):
    def after_loss(self):
        if self.learn.training:
            self.value = self.learn.loss.item()

    def after_step(self):
        self.values = self.learn.loss.cpu()

    def before_validate(self):
        self.outside = float(next(self.model.parameters()).sum())


def test_one_that_says_it_reads_only_and_moves_a_random_state_is_found_out():
    assert "  BROKEN  only reads\n          moves no random state: after a fit" in broken(DrawsOnce)


def test_one_that_says_it_reads_only_and_moves_weights_is_found_out():
    assert "moves no loss and no weight: a fit without it gives others" in broken(MovesWeights)


def test_a_tie_in_the_order_is_named_with_its_event():
    text = broken(NextToRecorder)
    assert "in after_epoch, NextToRecorder Recorder if it is added first, Recorder NextToRecorder if last" in text
    assert "→ Give it an `order` of its own, or a law: `run_after = …`." in text


def test_a_law_or_an_order_of_its_own_settles_the_tie():
    for settled in ({"run_after": ll.Recorder}, {"order": ll.Recorder.order + 1}):
        make = type("Settled", (NextToRecorder,), settled)
        assert check_callback(make, events=[]).broken == {}


def test_where_another_callback_of_the_learner_does_the_same_the_order_shows():
    assert "has one place in the order" in broken(HalvesLoss, lambda: toy_learner(16, 8, cbs=AddsToLoss()))


def test_one_that_fails_in_mixed_precision_is_named():
    assert "trains beside MixedPrecision: ZeroDivisionError: float32 alone" in broken(FullPrecisionOnly)


def test_one_that_refuses_mixed_precision_before_the_first_batch_keeps_the_promise():
    report = check_callback(RefusesMixedPrecision, events=[])
    assert "  -       works in mixed precision: refused: ValueError: no mixed precision here." in str(report)


def test_one_that_fails_with_accumulated_gradients_is_named():
    assert "trains beside GradientAccumulation: ZeroDivisionError: no step" in broken(StepsAlways)


def test_reads_in_training_batches_are_counted_and_no_others():
    assert check_callback(Reads, events=[]).host_reads == 2
    assert check_callback(ll.Callback, events=[]).host_reads == 0


def test_the_library_says_in_the_report_that_it_accumulates_itself():
    report = check_callback(lambda: ll.GradientAccumulation(16), events=[])
    assert "  -       works with accumulated gradients: is one itself" in str(report)


def test_several_callbacks_that_belong_together_are_checked_together():
    report = check_callback(lambda: [Reads(), HalvesLoss()], events=["after_loss"])
    assert report.callback == "Reads and HalvesLoss"
    assert report.broken == {}


def test_one_without_which_the_learner_cannot_train_may_be_taken_off():
    class OwnLoss(ll.Callback):
        def after_pred(self):
            self.learn.loss_grad = self.learn.loss = (self.learn.pred - self.learn.y).abs().mean()

    def make_learner():
        learn = toy_learner(16, 8)
        learn.loss_func = None
        return learn

    assert re.match("OwnLoss keeps every promise", str(check_callback(OwnLoss, make_learner, events=["after_loss"])))
