"""Metrics: their numbers, what they accept, and that they never make the host wait.

Numbers marked as fastai's come from fastai 2.8.12, run on the same inputs.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from learnloop.data.batches import SINGLES
from learnloop.metrics import (
    AvgLoss,
    AvgMetric,
    AvgSmoothLoss,
    Metric,
    ValueMetric,
    accuracy,
    error_rate,
    mk_metric,
    smooth,
)


def batch(pred=None, y=None, loss=None):
    """What a metric reads of a learner."""
    return SimpleNamespace(pred=pred, yb=() if y is None else (y,), loss=loss)


def class_batches(sizes=(4, 4, 3)):
    for n in sizes:
        yield torch.sin(torch.arange(n * 3).float() * 1.3 + n).view(n, 3), (torch.arange(n) * 2 + 1) % 3


def averaged(metric, *learns):
    for learn in learns:
        metric.accumulate(learn)
    return metric.value


def of_value(value, n=1):
    return batch(pred=value, y=torch.zeros(n))


def itself():
    """A metric whose function returns the prediction."""
    return AvgMetric(lambda pred, y: pred)


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a number to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# -- averages


def test_a_function_is_averaged_over_items_not_batches():
    value = averaged(AvgMetric(accuracy), *(batch(pred, y) for pred, y in class_batches()))
    assert value.item() == pytest.approx(0.4545454, abs=1e-6)  # fastai's; the mean over batches is 0.4444


def test_the_loss_is_averaged_over_items_not_batches():
    learns = [batch(y=torch.zeros(n), loss=torch.tensor(x)) for x, n in ((0.7, 4), (0.5, 4), (0.9, 3))]
    assert averaged(AvgLoss(), *learns).item() == pytest.approx(0.6818182, abs=1e-6)  # fastai's


def test_a_loss_that_was_not_reduced_counts_with_its_mean():
    assert averaged(AvgLoss(), batch(y=torch.zeros(3), loss=torch.tensor([1.0, 2.0, 6.0]))).item() == 3.0


@pytest.mark.parametrize("metric", [itself(), AvgLoss(), AvgSmoothLoss()])
def test_nothing_accumulated_is_none(metric):
    assert metric.value is None


def test_a_batch_without_targets_is_skipped():
    assert averaged(itself(), batch(pred=torch.tensor(1.0), loss=torch.tensor(1.0))) is None


def test_the_loss_of_a_batch_without_targets_is_weighted_with_its_inputs():
    metric = AvgLoss()
    for n, loss in ((1, 1.0), (3, 5.0)):
        metric.accumulate(SimpleNamespace(xb=(torch.zeros(n),), yb=(), pred=None, loss=torch.tensor(loss)))
    assert metric.value.item() == 4.0


@pytest.mark.parametrize("metric", [itself(), AvgLoss(), AvgSmoothLoss()])
def test_reset_forgets(metric):
    averaged(metric, batch(torch.tensor(1.0), torch.zeros(2), torch.tensor(1.0)))
    metric.reset()
    assert metric.value is None


def test_python_numbers_stay_python_numbers():
    value = averaged(itself(), of_value(0.25), of_value(1, n=3))
    assert type(value) is float
    assert value == 0.8125


def test_a_function_may_return_a_tensor_now_and_a_number_then():
    assert averaged(itself(), of_value(torch.tensor(1.0)), of_value(0.0)).item() == 0.5


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_means_are_in_float32_or_better(dtype, expected):
    assert averaged(itself(), of_value(torch.tensor(1.0, dtype=dtype))).dtype == expected


def test_a_large_batch_does_not_overflow_half_precision():
    assert averaged(itself(), of_value(torch.tensor(2.0, dtype=torch.float16), n=60_000)).item() == 2.0


def test_one_number_in_a_vector_is_one_number():
    value = averaged(itself(), of_value(torch.tensor([2.0])))
    assert value.shape == ()
    assert value.item() == 2.0


def test_values_carry_no_graph():
    assert not averaged(itself(), of_value(torch.ones(1, requires_grad=True).sum())).requires_grad


def test_reading_twice_gives_the_same():
    metric = itself()
    averaged(metric, of_value(torch.tensor(0.1)), of_value(torch.tensor(0.7), n=3))
    assert torch.equal(metric.value, metric.value)


def test_reading_in_between_changes_no_bit_of_the_result():
    read, unread = itself(), itself()
    for i in range(SINGLES + 10):
        learn = of_value(torch.tensor(math.sin(i)), n=i % 7 + 1)
        averaged(read, learn)
        unread.accumulate(learn)
    assert torch.equal(read.value, unread.value)


def test_many_batches_do_not_drift():
    metric, n = itself(), 20 * SINGLES
    for i in range(n):
        metric.accumulate(of_value(torch.tensor(0.1 + i * 1e-6)))
    assert metric.value.item() == pytest.approx(0.1 + (n - 1) / 2 * 1e-6, rel=1e-6)


def test_what_is_kept_does_not_grow_with_the_batches():
    metric = itself()
    for _ in range(2 * SINGLES + 5):
        metric.accumulate(of_value(torch.tensor(1.0)))
    assert len(metric._recent) == 5
    assert metric.count == 2 * SINGLES


@pytest.mark.parametrize("metric", [AvgMetric(lambda pred, y: pred.mean()), AvgLoss()])
def test_no_number_stays_single_beside_predictions_that_take_a_megabyte(metric):
    pred = torch.ones(1 << 18)
    for loss in (1.0, 2.0):
        metric.accumulate(batch(pred, torch.zeros(1 << 18), torch.tensor(loss)))
    assert (len(metric._recent), metric.count) == (0, 2 << 18)


@pytest.mark.parametrize("metric", [AvgMetric(accuracy), AvgLoss(), AvgSmoothLoss()])
def test_accumulating_never_brings_a_number_to_the_host(metric):
    pred, y = next(class_batches())
    with HostReads() as reads:
        for _ in range(SINGLES + 1):
            metric.accumulate(batch(pred, y, torch.tensor(1.0)))
    assert reads.count == 0


@pytest.mark.parametrize("shape", [(64, 10), (0,)])
def test_a_metric_that_returns_no_single_number_is_refused(shape):
    def per_item(pred, y):
        return pred

    with pytest.raises(ValueError, match=rf"metric `per_item` returned shape \({shape[0]},.*Return its `.mean\(\)`"):
        AvgMetric(per_item).accumulate(of_value(torch.zeros(shape)))


def test_a_metric_that_returns_no_number_at_all_is_refused():
    def forgot(pred, y):
        pass

    with pytest.raises(TypeError, match="metric `forgot` returned None"):
        AvgMetric(forgot).accumulate(of_value(torch.tensor(1.0)))


def test_a_subclass_may_keep_total_and_count_itself():
    class Sum(AvgMetric):
        def accumulate(self, learn):
            self.total += self.func(learn.pred, *learn.yb)
            self.count += 2

    assert averaged(Sum(lambda pred, y: pred), of_value(3.0), of_value(5.0)) == 2.0


# -- smoothing

LOSSES = [math.sin(i * 1.7) * 0.5 + 1 + 1 / (i + 1) for i in range(3000)]


def test_the_smoothed_loss_is_fastais():
    means = smooth(LOSSES, 0.98)
    assert len(means) == 3000
    assert [means[i] for i in (0, 1, 2, 99, 999, 2999)] == pytest.approx(
        [1.9999981, 1.9978933, 1.7284294, 1.0212326, 1.0071287, 1.0066447],
        abs=3e-6,  # fastai's, in float32
    )


def test_smoothing_goes_on_from_a_running_mean():
    first = smooth(LOSSES[:10], 0.9)
    val = first[-1] * (1 - 0.9**10)
    assert first + smooth(LOSSES[10:20], 0.9, val=val, count=10) == pytest.approx(smooth(LOSSES[:20], 0.9), abs=1e-12)


def test_smoothing_nothing_is_nothing():
    assert smooth([], 0.9) == []


def test_the_metric_agrees_with_the_function_over_thousands_of_losses():
    metric, means = AvgSmoothLoss(), smooth(LOSSES, 0.98)
    for i, loss in enumerate(LOSSES):
        metric.accumulate(batch(loss=torch.tensor(loss)))
        if i in (0, 1, 300, 2999):  # a read after few, after many, and at the end
            assert metric.value.item() == pytest.approx(means[i], abs=1e-6)
    assert metric.count == 3000


def test_the_smoothed_loss_counts_batches_without_targets():
    metric = AvgSmoothLoss()
    metric.accumulate(batch(loss=torch.tensor(2.0)))
    assert (metric.value.item(), metric.count) == (2.0, 1)


def test_a_beta_that_never_learns_is_refused():
    with pytest.raises(ValueError, match="`beta` is 1"):
        AvgSmoothLoss(beta=1)


# -- names and making


class MyOwnMetric(Metric):
    pass


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (AvgMetric(accuracy), "accuracy"),
        (AvgMetric(partial(partial(accuracy, axis=1), axis=2)), "accuracy"),
        (AvgMetric(nn.MSELoss()), "MSELoss"),
        (AvgLoss(), "loss"),
        (AvgSmoothLoss(), "avg_smooth_loss"),
        (MyOwnMetric(), "my_own"),
        (ValueMetric(len, "size"), "size"),
        (ValueMetric(len), "len"),
    ],
)
def test_names(metric, name):
    assert metric.name == name


def test_mk_metric_takes_functions_classes_and_metrics():
    made = AvgLoss()
    assert mk_metric(made) is made
    assert type(mk_metric(AvgLoss)) is AvgLoss
    assert mk_metric(accuracy).func is accuracy
    assert mk_metric(nn.L1Loss).name == "L1Loss"


@pytest.mark.parametrize("wrong", ["accuracy", 3, None])
def test_mk_metric_names_what_is_no_metric(wrong):
    with pytest.raises(TypeError, match=f"`metrics` holds {wrong!r}"):
        mk_metric(wrong)


@pytest.mark.parametrize("on", ["train", "valid", "both"])
def test_mk_metric_may_say_in_which_phase_a_metric_is_computed(on):
    assert mk_metric(accuracy, on=on).on == on
    made = AvgLoss()
    assert mk_metric(made, on=on) is made and made.on == on
    assert mk_metric(made).on == on


def test_a_metric_that_says_nothing_is_computed_where_the_recorder_says():
    assert mk_metric(accuracy).on is None


def test_mk_metric_names_a_phase_that_is_none():
    with pytest.raises(ValueError, match='metric `accuracy` is on=\'eval\'; pass "train", "valid", "both" or None'):
        mk_metric(accuracy, on="eval")


def test_where_a_metric_is_computed_is_no_part_of_its_state():
    assert "on" not in mk_metric(accuracy, on="both").state_dict()


def test_a_value_metric_is_computed_when_it_is_read():
    seen = []
    metric = ValueMetric(lambda: len(seen))
    seen.append(1)
    assert metric.value == 1


def test_a_metric_without_a_value_says_so():
    with pytest.raises(NotImplementedError, match="`MyOwnMetric` has no `value`"):
        _ = MyOwnMetric().value


# -- state


@pytest.mark.parametrize("make", [itself, AvgLoss, AvgSmoothLoss])
@pytest.mark.parametrize("n_before", [0, 1, SINGLES + 3])
def test_a_metric_put_back_half_way_ends_with_the_same_bits(make, n_before):
    learns = [batch(x := torch.tensor(math.sin(i) + 2), torch.zeros(i % 5 + 1), x) for i in range(n_before + SINGLES)]
    whole, first, second = make(), make(), make()
    expected = averaged(whole, *learns)
    averaged(first, *learns[:n_before])
    second.load_state_dict(first.state_dict())
    assert torch.equal(averaged(second, *learns[n_before:]), expected)


@pytest.mark.parametrize("make", [itself, AvgLoss, AvgSmoothLoss])
def test_a_stored_state_is_not_changed_by_later_batches(make):
    metric, learn = make(), batch(torch.tensor(1.0), torch.zeros(2), torch.tensor(1.0))
    metric.accumulate(learn)
    state = metric.state_dict()
    averaged(metric, batch(torch.tensor(9.0), torch.zeros(2), torch.tensor(9.0)))
    metric.load_state_dict(state)
    assert metric.value.item() == 1.0


@pytest.mark.parametrize("make", [itself, AvgLoss, AvgSmoothLoss])
def test_a_state_is_read_without_running_code(make, tmp_path):
    metric = make()
    metric.accumulate(batch(torch.tensor(1.0), torch.zeros(2), torch.tensor(1.0)))
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.value.item() == 1.0


def test_a_users_own_metric_is_stored_by_its_numbers_and_tensors():
    class Dice(Metric):
        def __init__(self):
            self.func, self.inter, self.union, self.seen = accuracy, torch.tensor(2.0), 3, [1, torch.tensor(4.0)]

    metric = Dice()
    state = metric.state_dict()
    metric.inter += 1
    assert state == {"inter": 2.0, "union": 3, "seen": [1, 4.0]}


# -- functions


def test_accuracy_is_the_share_of_right_classes():
    pred, y = next(class_batches())
    assert accuracy(pred, y).item() == 0.5  # fastai's
    assert error_rate(pred, y).item() == 0.5


def test_accuracy_takes_targets_of_another_shape_with_as_many_elements():
    pred, y = next(class_batches())
    assert accuracy(pred, y[:, None]).item() == 0.5  # fastai's


def test_accuracy_along_another_axis():
    pred, y = torch.sin(torch.arange(24).float()).view(2, 3, 2, 2), torch.arange(8).view(2, 2, 2) % 3
    assert accuracy(pred, y, axis=1).item() == 0.25  # fastai's
    assert error_rate(pred, y, axis=1).item() == 0.75


def test_accuracy_refuses_another_number_of_targets():
    with pytest.raises(ValueError, match=r"predictions have shape \(4,\) and the targets \(3,\)"):
        accuracy(torch.zeros(4, 3), torch.zeros(3))


def test_a_metric_shows_its_name():
    metric = AvgMetric(accuracy)
    assert repr(metric) == "AvgMetric(accuracy)"
    assert repr(mk_metric(accuracy, on="both")) == "AvgMetric(accuracy, on='both')"
    assert metric._repr_html_() == "<pre>AvgMetric(accuracy)</pre>"
