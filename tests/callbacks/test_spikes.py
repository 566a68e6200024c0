"""SpikeGuard, compared with trainings that never saw the batches which it leaves out."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.spikes import upper_limit
from learnloop.testing import check_callback
from tests.resuming import assert_resumes_exactly

BAD = 1e3  # what the targets of a bad batch are multiplied by


def batches(n=12, bad=(), factor=BAD):
    t = torch.linspace(-1, 1, n * 4).view(n, 4).T.reshape(-1, 1)[torch.randperm(n * 4, generator=torch.manual_seed(5))]
    x, y = torch.cat([t, t**2], 1), 2 * t - t**2 + 0.5
    return [(a, b * (factor if i in bad else 1)) for i, (a, b) in enumerate(zip(x.split(4), y.split(4), strict=True))]


def learner(data, *cbs, model=None, **kwargs):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) if model is None else model
    cbs = [ll.TrainEvalCallback(), ll.Recorder(), *cbs]
    options = {"lr": 0.01, "cbs": cbs, "default_cbs": False, **kwargs}
    learn = ll.Learner(ll.DataLoaders(data, device="cpu"), model, nn.MSELoss(), ll.SGD, **options)
    learn.logger = lambda row: None
    return learn


def state(learn):
    return {name: t.tolist() for name, t in learn.model.state_dict().items()}


def guard(**kwargs):
    """One that knows its range after three batches, and so has to be generous."""
    return ll.SpikeGuard(**{"loss": 50.0, "grad_norm": 50.0, "warmup": 3, "window": 8, **kwargs})


def left_out(cb):
    return [(entry["epoch"], entry["batch"], entry["what"]) for entry in cb.skipped]


# The range


def test_the_limit_is_the_median_and_so_many_robust_deviations():
    values = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3; deviations 2, 1, 0, 1, 97 with median 1
    assert upper_limit(values, 8.0) == pytest.approx(3 + 8 * 1.4826)


def test_of_normal_numbers_the_robust_deviation_is_their_standard_deviation():
    values = np.random.default_rng(0).normal(5, 2, 100_000).tolist()
    assert upper_limit(values, 1.0) == pytest.approx(7, abs=0.05)


def test_where_values_hardly_move_one_percent_of_the_median_counts_as_their_deviation():
    assert upper_limit([2.0] * 5, 8.0) == pytest.approx(2 + 8 * 0.02)


# What is left out


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_training_with_a_spike_is_that_without_the_batch(what):
    other = {"loss": "grad_norm", "grad_norm": "loss"}[what]
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    learn = learner(batches(bad=[7]), cb := guard(**{other: None}), model=model)
    learn.fit(1)
    found = state(learn)
    model.load_state_dict(start)
    without = learner([b for i, b in enumerate(batches()) if i != 7], model=model)
    without.fit(1)
    assert found == state(without)
    assert left_out(cb) == [(0, 7, what)]
    assert cb.skipped[0]["value"] > cb.skipped[0]["limit"] > 0
    assert (learn.train_iter, learn.opt_iter) == (12, 11)


def test_the_running_statistics_do_not_see_a_batch_with_a_spike_in_its_loss():
    data = batches()
    data[7] = (data[7][0] * BAD, data[7][1] * BAD)
    learn, without = learner(data, guard()), learner([b for i, b in enumerate(batches()) if i != 7])
    learn.fit(1)
    without.fit(1)
    assert state(learn) == state(without)


def test_the_loss_of_the_batch_stays_in_the_record():
    learn = learner(batches(bad=[7]), cb := guard())
    learn.fit(1)
    assert len(learn.recorder.raw_losses) == 12
    assert learn.recorder.raw_losses[7] == cb.skipped[0]["value"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_left_out_from_the_first_batch_on(value):
    learn = learner(batches(bad=[0], factor=value), cb := guard())
    learn.fit(1)
    assert left_out(cb) == [(0, 0, "loss")]
    assert all(math.isfinite(x) for x in learn.model[0].weight.flatten().tolist())


def test_a_quiet_training_is_to_the_bit_what_it_is_without():
    learn, without = learner(batches(), cb := guard()), learner(batches())
    learn.fit(3)
    without.fit(3)
    assert cb.skipped == [] and state(learn) == state(without)


# Composed


def test_under_accumulation_a_spike_in_the_loss_leaves_its_batch_out_of_the_window():
    model = nn.Linear(2, 1)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    learn = learner(batches(bad=[7]), cb := guard(grad_norm=None), ll.GradientAccumulation(12), model=model)
    learn.fit(1)
    found = state(learn)
    model.load_state_dict(start)
    without = learner([b for i, b in enumerate(batches()) if i != 7], ll.GradientAccumulation(12), model=model)
    without.fit(1)
    assert left_out(cb) == [(0, 7, "loss")] and found == state(without)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_in_mixed_precision_the_norm_is_that_of_unscaled_gradients(mode):
    seen = []

    def look(cb):
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in cb.learn.model.parameters()]).item())

    mixed = ll.MixedPrecision(mode, init_scale=2.0**8)
    cb = guard()
    learn = learner(batches(6), cb, mixed, ll.GradientClip(1e-3), ll.Callback(after_step=look))
    learn.fit(1)
    assert all(norm == pytest.approx(1e-3, rel=1e-2) for norm in seen)  # clipped after it was looked at
    plain = guard()
    learner(batches(6), plain, ll.GradientClip(1e-3)).fit(1)
    assert cb._recent["grad_norm"] == pytest.approx(plain._recent["grad_norm"], rel=0.05)


def test_the_second_pass_of_sam_and_parts_of_a_batch_are_not_looked_at():
    cb = guard()
    learner(batches(6), cb, ll.SAM(), ll.MicroBatch(2), model=nn.Linear(2, 1)).fit(1)
    assert [len(values) for values in cb._recent.values()] == [6, 6]


# Not without end


def test_another_level_is_trained_on_after_a_while():
    learn = learner(batches(14, bad=range(8, 14), factor=100), cb := guard(max_in_row=3, grad_norm=None))
    with pytest.warns(UserWarning, match="taken for its new level"):
        learn.fit(1)
    assert left_out(cb) == [(0, 8, "loss"), (0, 9, "loss"), (0, 10, "loss")]
    assert learn.opt_iter == 11


def test_batches_between_which_one_is_good_are_not_in_a_row():
    learn = learner(batches(14, bad=[6, 7, 9, 10, 12]), cb := guard(max_in_row=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn.fit(1)
    assert [entry["batch"] for entry in cb.skipped] == [6, 7, 9, 10, 12]


def test_what_is_not_finite_never_reaches_the_weights():
    learn = learner(batches(20, bad=range(8, 20), factor=math.nan), guard(max_in_row=3))
    with pytest.raises(
        FloatingPointError, match="left out 3 batches in a row, and in epoch 0, batch 11 the loss is nan"
    ):
        learn.fit(1)
    assert all(math.isfinite(x) for x in learn.model[0].weight.flatten().tolist())


# As a callback


def test_it_resumes_exactly_with_its_range_and_what_it_left_out():
    data = batches(6, bad=[4])
    assert_resumes_exactly(lambda: learner(data, guard()), every=9)


def test_it_keeps_every_promise():
    check_callback(lambda: guard(), events=("after_loss", "before_step"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": 0}, "a number of deviations above 0"),
        ({"grad_norm": -1.0}, "a number of deviations above 0"),
        ({"warmup": 1}, "takes 2 values or more"),
        ({"warmup": 64, "window": 32}, "`window` at most"),
        ({"max_in_row": 0}, "pass 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ll.SpikeGuard(**wrong)
