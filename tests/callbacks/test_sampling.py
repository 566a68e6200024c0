"""WeightedSampling, OverfitBatch and ShortEpochCallback."""

import re
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import learnloop as ll
from learnloop.testing import EventLog, check_callback, toy_learner
from tests.resuming import assert_resumes_exactly

X = torch.arange(40.0)[:, None].expand(40, 2).contiguous()


def learner(*cbs, torch_loader=False, n=40, bs=8, **kwargs):
    """The first input of a sample is its number."""
    learn = toy_learner(cbs=cbs, lr=1e-5)
    x, y = X[:n], X[:n, :1]
    if torch_loader:
        loaders = [DataLoader(TensorDataset(x, y), bs, shuffle=True, **kwargs), DataLoader(TensorDataset(x, y), 20)]
    else:
        loaders = [ll.TensorLoader(x, y, bs=bs, shuffle=True, **kwargs), ll.TensorLoader(x, y, bs=20)]
    learn.dls = ll.DataLoaders(*loaders, device="cpu")
    return learn


def seen_by(*cbs, n_epoch=1, **kwargs):
    """The numbers of the samples in each training batch, and of all in validation."""
    train, valid = [], []
    note = ll.Callback(before_batch=lambda cb: (train if cb.training else valid).append(cb.x[:, 0].int().tolist()))
    note.order = 100
    torch.manual_seed(0)
    learn = learner(note, *cbs, **kwargs)
    learn.fit(n_epoch)
    return train, valid


# WeightedSampling


@pytest.mark.parametrize("torch_loader", [False, True])
def test_samples_come_as_often_as_their_weights_say(torch_loader):
    weights = [0.0] * 20 + [1.0] * 10 + [3.0] * 10
    train, valid = seen_by(ll.WeightedSampling(weights), n_epoch=100, torch_loader=torch_loader)
    counts = torch.bincount(torch.tensor([i for batch in train for i in batch]), minlength=40)
    # 4,000 draws: 1,000 of the weight 1 expected and 3,000 of the weight 3, with a standard deviation of 27
    assert counts[:20].sum() == 0
    assert 890 < counts[20:30].sum() < 1110
    assert sorted(i for batch in valid for i in batch)[:4] == [0] * 4


@pytest.mark.parametrize("torch_loader", [False, True])
def test_epochs_differ_and_the_same_seed_draws_the_same(torch_loader):
    def draw():
        return seen_by(ll.WeightedSampling([1.0] * 40), n_epoch=2, torch_loader=torch_loader)[0]

    train = draw()
    assert train == draw()
    assert train[:5] != train[5:]
    assert len({i for batch in train[:5] for i in batch}) < 40  # with replacement


@pytest.mark.parametrize("torch_loader", [False, True])
def test_an_epoch_may_have_another_number_of_samples(torch_loader):
    sampling = ll.WeightedSampling([1.0] * 40, n=20)
    assert [len(b) for b in seen_by(sampling, torch_loader=torch_loader)[0]] == [8, 8, 4]
    assert [len(b) for b in seen_by(sampling, torch_loader=torch_loader, drop_last=True)[0]] == [8, 8]


def test_afterwards_the_loaders_are_those_of_before():
    learn = learner(ll.WeightedSampling([1.0] * 40))
    dls, loaders = learn.dls, list(learn.dls.loaders)
    learn.fit(1)
    assert learn.dls is dls and list(dls.loaders) == loaders


def test_a_loader_with_a_seed_of_its_own_draws_the_same_in_every_fit():
    def draw(seed):
        train = []
        learn = learner(ll.WeightedSampling([1.0] * 40), seed=7)
        learn.add_cb(ll.Callback(before_batch=lambda cb: train.append(cb.x[:, 0].tolist()) if cb.training else None))
        torch.manual_seed(seed)
        learn.fit(1)
        return train

    assert draw(0) == draw(1)


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="`weights` are finite, not negative, and not all of them 0"):
        ll.WeightedSampling(weights)


def test_another_number_of_weights_than_samples_is_refused():
    with pytest.raises(ValueError, match="`weights` has 3 numbers, and the training set 40 samples"):
        learner(ll.WeightedSampling([1.0] * 3)).fit(1)


def test_loaders_that_cannot_be_sampled_are_refused():
    learn = learner(ll.WeightedSampling([1.0] * 40))
    learn.dls = ll.DataLoaders([(X, X[:, :1])], device="cpu")
    with pytest.raises(TypeError, match="draws from a TensorLoader or a map-style torch DataLoader; list is neither"):
        learn.fit(1)


@pytest.mark.parametrize("torch_loader", [False, True])
@pytest.mark.parametrize("fit", [lambda learn: learn.fit(2), lambda learn: learn.fit(n_step=7, valid_every=3)])
def test_a_weighted_fit_that_was_stopped_goes_on_exactly(torch_loader, fit):
    def make():
        return learner(ll.WeightedSampling([1.0] * 20 + [2.0] * 20), torch_loader=torch_loader)

    assert_resumes_exactly(make, fit, every=13)


# OverfitBatch


def test_the_first_batches_come_again_and_again():
    train, valid = seen_by(ll.OverfitBatch(2), n_epoch=2)
    without, valid_without = seen_by(n_epoch=2)
    assert train == [without[i % 2] for i in range(10)]
    assert valid == valid_without


def test_one_batch_is_the_default_and_another_fit_takes_another():
    learn, seen = learner(ll.OverfitBatch()), []
    learn.add_cb(ll.Callback(before_batch=lambda cb: seen.append(cb.x[:, 0].tolist()) if cb.training else None))
    learn.fit(1)
    learn.fit(1)
    assert seen[:5] == [seen[0]] * 5
    assert seen[5:] == [seen[5]] * 5
    assert seen[0] != seen[5]


def test_what_others_do_to_a_batch_in_place_is_not_kept():
    sums = []

    def spoil(cb):
        if cb.training:
            sums.append(cb.x.sum().item())
            cb.x.add_(100)

    learner(ll.OverfitBatch(), ll.Callback(before_batch=spoil)).fit(1)
    assert len(set(sums)) == 1


def test_a_model_learns_one_batch_by_heart():
    learn = toy_learner(cbs=ll.OverfitBatch(), opt_func=ll.Adam, lr=0.02)
    learn.fit(100)
    assert learn.recorder.raw_losses[-1] < 1e-3 < learn.recorder.raw_losses[0]


def test_after_a_fit_no_batch_is_kept():
    overfit = ll.OverfitBatch()
    learner(overfit).fit(1)
    assert overfit.kept == []


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_number_of_batches_that_is_none_is_refused(n):
    with pytest.raises(ValueError, match=re.escape(f"`n={n!r}`: pass a whole number of batches")):
        ll.OverfitBatch(n)


def test_a_fit_on_one_batch_that_was_stopped_goes_on_exactly():
    assert_resumes_exactly(lambda: learner(ll.OverfitBatch(2), n=24), every=5)


# ShortEpochCallback


@pytest.mark.parametrize(
    ("pct", "n"), [(0.01, 1), (0.1, 1), (0.11, 2), (0.25, 3), (0.3, 3), (0.7, 7), (0.99, 10), (1.0, 10), (2.0, 10)]
)
def test_exactly_that_part_of_the_batches_is_run(pct, n):
    train, valid = seen_by(ll.ShortEpochCallback(pct), n_epoch=2, bs=4)
    assert (len(train), len(valid)) == (2 * n, 2 * (1 if pct <= 0.5 else 2))


def test_validation_stays_whole_where_it_is_told_to():
    train, valid = seen_by(ll.ShortEpochCallback(0.01, short_valid=False))
    assert (len(train), len(valid)) == (1, 2)


def test_a_phase_is_cancelled_only_where_something_is_cut():
    for pct, events in ((1.0, []), (0.5, ["after_cancel_train", "after_cancel_validate"])):
        log = EventLog(cleanups=False)
        learner(ll.ShortEpochCallback(pct), log).fit(1)
        assert [e for e in log.events if e.startswith("after_cancel")] == events


def test_validate_is_never_short():
    assert learner(ll.ShortEpochCallback()).validate()[0] == pytest.approx(learner().validate()[0])


def test_a_fit_by_steps_is_refused():
    with pytest.raises(ValueError, match=r"of `fit\(n_step=…\)` make fewer steps instead"):
        learner(ll.ShortEpochCallback()).fit(n_step=5)


def test_a_short_fit_that_was_stopped_goes_on_exactly():
    assert_resumes_exactly(lambda: learner(ll.ShortEpochCallback(0.5)), every=5)


# Promises


@pytest.mark.parametrize(
    "make",
    [partial(ll.WeightedSampling, [1.0] * 20 + [2.0] * 20), ll.OverfitBatch, partial(ll.ShortEpochCallback, 0.5)],
)
def test_they_keep_every_promise(make):
    check_callback(
        make, partial(learner, bs=16), events=["before_fit", "before_batch", "after_loss", "before_validate"]
    )
