"""BatchTransform, ProgressiveResize and CollectDataCallback."""

import re
from functools import partial

import pytest
import torch
from torch import nn

import learnloop as ll
from learnloop.callbacks.data import part_at, size_near
from learnloop.testing import check_callback, toy_learner
from tests.resuming import assert_resumes_exactly


class Pooled(nn.Sequential):
    """Takes images of any size."""

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Conv2d(1, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1))


def image_learner(*cbs, size=8):
    learn = toy_learner(model=Pooled(), cbs=cbs)
    x = torch.linspace(0, 9, 16 * size * size).sin().view(16, 1, size, size)
    loaders = [ll.TensorLoader(x[:n], x[:n].mean((1, 2, 3))[:, None], bs=4) for n in (16, 8)]
    learn.dls = ll.DataLoaders(*loaders, device="cpu")
    return learn


def seen_by(*cbs, n_epoch=1, make=image_learner):
    """(training, inputs) of every batch as the model gets it."""
    seen = []
    note = ll.Callback(before_batch=lambda cb: seen.append((cb.training, cb.x.clone())))
    note.order = 100
    make(note, *cbs).fit(n_epoch)
    return seen


# BatchTransform


def test_functions_run_one_after_the_other_in_training_alone():
    changed = seen_by(ll.BatchTransform(lambda x: x + 1, lambda x: x * 2))
    for (training, x), (_, original) in zip(changed, seen_by(), strict=True):
        assert torch.equal(x, (original + 1) * 2 if training else original)


def test_with_valid_they_run_in_validation_too():
    normalize = partial(ll.transforms.normalize, mean=[0.5], std=[2.0])
    changed = seen_by(ll.BatchTransform(normalize, valid=True))
    assert {training for training, _ in changed} == {True, False}
    for (_, x), (_, original) in zip(changed, seen_by(), strict=True):
        assert torch.allclose(x, (original - 0.5) / 2)


def test_targets_and_further_inputs_stay():
    class TwoInputs(nn.Linear):
        def forward(self, x, z):
            seen.append((x.unique().tolist(), z.unique().tolist()))
            return super().forward(x)

    seen = []
    learn = toy_learner(model=TwoInputs(2, 1), cbs=ll.BatchTransform(torch.zeros_like), n_valid=0)
    learn.dls = ll.DataLoaders([(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 1))], device="cpu", n_inp=2)
    learn.fit(1)
    assert seen == [([0.0], [1.0])]


def test_the_data_itself_is_not_changed():
    learn = image_learner(ll.BatchTransform(lambda x: x.add_(1)))
    before = learn.dls.train.tensors[0].clone()
    learn.fit(1)
    assert torch.equal(learn.dls.train.tensors[0], before)


def test_random_transforms_are_another_every_time_and_the_same_with_the_same_seed():
    def noise(seed):
        torch.manual_seed(seed)
        return torch.stack([x for training, x in seen_by(ll.BatchTransform(ll.transforms.flip)) if training])

    first, second, other = noise(1), noise(1), noise(2)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_anything_but_a_function_is_refused():
    with pytest.raises(TypeError, match="`'flip'` is no function; pass functions of a batch"):
        ll.BatchTransform("flip")


def test_an_input_that_is_no_tensor_is_refused():
    learn = image_learner(ll.BatchTransform(ll.transforms.flip))
    learn.dls = ll.DataLoaders([{"image": torch.ones(2, 1, 4, 4), "label": torch.ones(2, 1)}], device="cpu")
    with pytest.raises(TypeError, match="the first input is a dict"):
        learn.fit(1)


def test_a_fit_with_random_transforms_that_was_stopped_goes_on_exactly():
    change = [ll.transforms.flip, partial(ll.transforms.crop, padding=1), partial(ll.transforms.cutout, size=3)]
    assert_resumes_exactly(lambda: image_learner(ll.BatchTransform(*change)), every=5)


# ProgressiveResize


@pytest.mark.parametrize(
    ("progress", "part"), [(0.0, 0.5), (0.49, 0.5), (0.5, 0.5), (0.65, 0.75), (0.8, 1.0), (0.9, 1.0), (1.0, 1.0)]
)
def test_the_part_grows_evenly_between_delay_and_finetune(progress, part):
    assert part_at(progress, 0.5, 0.5, 0.2) == pytest.approx(part)


def test_where_nothing_is_left_to_grow_in_the_size_jumps():
    assert [part_at(p, 0.25, 0.5, 0.5) for p in (0.0, 0.49, 0.5, 1.0)] == [0.25, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("size", "full", "multiple", "expected"), [(14, 28, 4, 16), (13.9, 28, 4, 12), (27.9, 28, 4, 28), (28, 28, 8, 28)]
)
def test_a_size_is_the_nearest_multiple_and_never_above_the_whole(size, full, multiple, expected):
    assert size_near(size, full, multiple) == expected


def test_images_grow_in_training_and_are_whole_in_validation():
    sizes = [(training, x.shape[-1]) for training, x in seen_by(ll.ProgressiveResize(0.5, 0.25, 0.25, 2), n_epoch=2)]
    assert [size for training, size in sizes if training] == [4, 4, 4, 4, 6, 8, 8, 8]
    assert {size for training, size in sizes if not training} == {8}


def test_small_images_are_those_of_torch():
    original = dict(seen_by())[True]
    small = dict(seen_by(ll.ProgressiveResize(0.5, 1.0, 0.0)))[True]
    torchs = nn.functional.interpolate(original, size=(4, 4), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(small, torchs)


@pytest.mark.parametrize("kwargs", [{"initial": 0.0}, {"initial": 1.5}, {"delay": 0.9}, {"finetune": -0.1}])
def test_parts_that_are_none_are_refused(kwargs):
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=re.escape(f"`{name}={value}`")):
        ll.ProgressiveResize(**kwargs)


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(TypeError, match=r"needs images of shape .* and got float32\[8, 2\] cpu"):
        toy_learner(cbs=ll.ProgressiveResize()).fit(1)


# CollectDataCallback


def test_every_batch_is_collected_with_prediction_and_loss():
    collect = ll.CollectDataCallback()
    learn = toy_learner(n_train=16, n_valid=8, cbs=collect)
    learn.fit(1)
    assert len(collect.data) == 3
    for (x,), (y,), pred, loss in collect.data:
        assert loss.item() == pytest.approx((pred - y).square().mean().item())
        assert (x.shape, y.shape, pred.requires_grad) == ((8, 2), (8, 1), False)
    assert [float(row[3]) for row in collect.data[:2]] == learn.recorder.raw_losses


def test_what_was_collected_is_a_copy_and_stays_until_the_next_fit():
    collect = ll.CollectDataCallback()
    spoil = ll.Callback(after_batch=lambda cb: cb.learn.pred.zero_() if not cb.training else None)
    spoil.order = 10
    learn = toy_learner(n_train=16, n_valid=8, cbs=[collect, spoil])
    learn.fit(1)
    assert collect.data[-1][2].abs().sum() > 0
    learn.fit(2)
    assert len(collect.data) == 6


def test_a_batch_that_was_cancelled_has_no_prediction():
    def cancel(cb):
        raise ll.CancelBatchException

    collect = ll.CollectDataCallback()
    toy_learner(n_train=8, n_valid=0, cbs=[collect, ll.Callback(before_batch=cancel)]).fit(1)
    assert collect.data[0][2] is None


# Promises


def test_what_was_collected_survives_a_stop():
    assert_resumes_exactly(lambda: toy_learner(n_train=16, n_valid=8, cbs=ll.CollectDataCallback()), every=3)


@pytest.mark.parametrize(
    ("make", "make_learner"),
    [
        (ll.CollectDataCallback, None),
        (partial(ll.BatchTransform, lambda x: x + torch.rand(1), valid=True), None),
        (ll.ProgressiveResize, image_learner),
    ],
)
def test_they_keep_every_promise(make, make_learner):
    events = ["before_fit", "before_batch", "after_loss", "after_batch", "after_train", "before_validate"]
    check_callback(make, make_learner, events=events)
