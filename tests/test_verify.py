"""`learn.verify_resume()`: what can be resumed exactly, and the words for what cannot."""

import random
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from learnloop import (
    Callback,
    CancelFitException,
    Checkpoint,
    DataLoaders,
    Learner,
    ParamScheduler,
    ProgressCallback,
    SchedCos,
    TensorLoader,
)
from learnloop.data.keyed import random_states
from learnloop.testing import EventLog, toy_learner
from learnloop.verify import checksum
from tests.toys import raise_at

X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2


@pytest.fixture(autouse=True)
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


class Noisy(Dataset):
    """Noise from the global generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + torch.randn(4) + np.random.randn() + random.random(), Y[i]


class OwnNoise(Noisy):
    """Noise from a generator of its own, which nobody stores."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __getitem__(self, i):
        return X[i] + float(self.rng.normal()), Y[i]


class OwnOrder(Sampler):
    """An order from a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        return iter(self.rng.permutation(len(X)).tolist())

    def __len__(self):
        return len(X)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X + torch.randn(4), Y, strict=True)


class OwnDropout(nn.Module):
    """Scales by numbers from a generator of its own, as a kernel would that is not deterministic."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x):
        return x * float(self.rng.random())


class OwnStep(Callback):
    """Moves the weights by numbers from a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def after_step(self):
        with torch.no_grad():
            for p in self.learn.model.parameters():
                p.add_(float(self.rng.normal()))


class KeptStep(OwnStep):
    _stateattrs = ("rng",)


def learner(dataset=None, cbs=None, layer=None, sampler=None, **kwargs):
    torch.manual_seed(0)
    order = {"shuffle": True} if sampler is None else {"sampler": sampler}
    train = DataLoader(Noisy() if dataset is None else dataset, 8, **order, **kwargs)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), layer or nn.ReLU(), nn.Linear(8, 2)]
    learn = Learner(DataLoaders(train), nn.Sequential(*layers), nn.CrossEntropyLoss(), cbs=cbs)
    learn.logger = lambda row: None
    return learn


def here(learn, **kwargs):
    """The report of a check in this process, which is quicker: a local class cannot be made in another one."""

    class Local:
        def __reduce__(self):
            raise TypeError("made in a test")

        def __deepcopy__(self, memo):
            return self

    learn.local = Local()
    return learn.verify_resume(**kwargs)


# What can be resumed


def test_a_training_that_repeats_is_true_and_says_so():
    report = learner().verify_resume()
    assert report
    assert str(report) == (
        "stopped before batch 4 and resumed in a fresh process: 4 batches repeated bit for bit "
        "(indices, batches, losses, weights)"
    )


def test_what_cannot_be_made_in_a_fresh_process_is_checked_in_this_one_and_it_says_why():
    report = here(learner())
    assert report.process == "this process (a fresh one could not make the learner: made in a test)"
    assert report and report.n_batch == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: learner(num_workers=2),
        lambda: learner(cbs=KeptStep()),
        lambda: learner(cbs=[Checkpoint(), ProgressCallback(), EventLog()]),
        lambda: Learner(DataLoaders(TensorLoader(X, Y, bs=8, shuffle=True)), nn.Linear(4, 2), nn.CrossEntropyLoss()),
        lambda: Learner(DataLoaders(DataLoader(Stream(), 8)), nn.Linear(4, 2), nn.CrossEntropyLoss()),
        lambda: toy_learner(n_train=16),
    ],
)
def test_trainings_that_repeat(make):
    assert here(make())


def test_it_goes_over_the_end_of_an_epoch():
    report = here(learner(), n_batch=12, stop=3)
    assert (report.n_batch, report.stopped_at, report.differs) == (9, 3, {})


def test_a_schedule_is_part_of_it():
    assert here(learner(), cbs=ParamScheduler({"lr": SchedCos(0.1, 0.0)}))


def test_the_indices_are_compared_where_the_loader_is_of_torch():
    assert here(learner()).compared == ["indices", "batches", "losses", "weights"]
    assert here(toy_learner(n_train=16)).compared == ["batches", "losses", "weights"]


# What cannot


@pytest.mark.parametrize(
    ("make", "what", "words"),
    [
        (lambda: learner(sampler=OwnOrder()), "indices", "the sampler draws other samples"),
        (lambda: learner(OwnNoise()), "batches", "the dataset or the collate function has a generator of its own"),
        (lambda: learner(layer=OwnDropout()), "losses", "the model or the loss has randomness or state of its own"),
        (lambda: learner(cbs=OwnStep()), "weights", "the optimizer or a callback has state that is not stored"),
    ],
)
def test_what_is_not_reproducible_is_told_apart(make, what, words):
    report = here(make())
    assert not report
    assert next(iter(report.differs.items())) == (what, 4)
    assert f"not exact. From batch 4 on the {what} differ" in str(report)
    assert words in str(report)


def test_what_follows_from_the_cause_is_named_after_it():
    report = here(learner(sampler=OwnOrder()))
    assert "From batch 4 on the indices differ (batches, losses, weights follow)" in str(report)


# The learner afterwards


def test_the_learner_is_as_it_was():
    learn = learner()
    learn.fit(1)
    before = [p.tolist() for p in learn.model.parameters()], repr(learn.opt.state_dict()), learn.recorder.raw_losses
    states, cbs = random_states(), list(learn.cbs)
    here(learn)
    after = [p.tolist() for p in learn.model.parameters()], repr(learn.opt.state_dict()), learn.recorder.raw_losses
    assert after == before
    assert repr(random_states()) == repr(states)
    assert (list(learn.cbs), learn.task, learn.epoch, learn.train_iter) == (cbs, None, 0, 5)
    assert all(cb.learn is learn for cb in learn.cbs)


def test_a_generator_of_the_datasets_own_is_not_moved():
    learn = learner(OwnNoise())
    here(learn)
    assert learn.dls.train.dataset.rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_nothing_is_written_and_nothing_shown(tmp_path, capsys):
    learn = learner(cbs=Checkpoint("1step", path=tmp_path))
    learn.path, learn.logger = tmp_path, print
    here(learn)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


# How it is asked


@pytest.mark.parametrize(("n_batch", "stop"), [(1, None), (4, 4), (4, 0), (0, None)])
def test_a_stop_outside_of_the_batches_is_refused(n_batch, stop):
    with pytest.raises(ValueError, match="it stops after at least one batch and before the last"):
        learner().verify_resume(n_batch, stop)


def test_a_training_that_ends_before_the_stop_is_an_error():
    learn = toy_learner(cbs=raise_at("before_epoch", CancelFitException()))
    with pytest.raises(ValueError, match="the training ended before batch 4, so nothing could be resumed"):
        here(learn)


def test_during_a_run_it_is_refused():
    learn = toy_learner()
    learn.add_cb(Callback(before_batch=lambda cb: cb.learn.verify_resume()))
    with pytest.raises(RuntimeError, match="`verify_resume` was called while a run is active"):
        learn.fit(1)


def test_an_error_of_the_training_is_raised_as_it_is():
    class Fails(TensorDataset):
        def __getitem__(self, i):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        here(learner(Fails(X, Y)))


def test_it_works_in_a_thread():
    reports = []
    thread = threading.Thread(target=lambda: reports.append(here(learner())))
    thread.start()
    thread.join()
    assert reports[0]


# Checksums


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        ({"a": torch.ones(1)}, {"a": torch.zeros(1)}),
        ([1, "a"], [1, "b"]),
    ],
)
def test_a_checksum_sees_every_bit_the_shape_and_the_kind(one, other):
    assert checksum(one) != checksum(other)
    assert checksum(one) == checksum(one)


def test_a_checksum_is_that_of_the_values_not_of_their_place_in_memory():
    t = torch.arange(6.0).reshape(2, 3)
    assert checksum(t.T) == checksum(t.T.contiguous())
    assert checksum(torch.tensor(float("nan"))) == checksum(torch.tensor(float("nan")))


def test_the_report_of_a_difference_is_one_line():
    assert re.fullmatch(r"stopped before .*\.", str(here(learner(OwnNoise()))))
