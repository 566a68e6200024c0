"""The finer points of the checks of data."""

import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import learnloop as ll
from learnloop.insight import data_checks
from tests.insight.test_check import DIGITS, digits, mlp


def over(train, valid, **kwargs):
    torch.manual_seed(0)
    return ll.Learner(ll.DataLoaders(train, valid, device="cpu", **kwargs), mlp(), nn.CrossEntropyLoss())


def found(learn, name):
    return learn.check(only=name)[name]


TRAIN, VALID = TensorDataset(*DIGITS[:2]), TensorDataset(*DIGITS[2:])


class Augmented(Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        x, y = self.inner[i]
        return x + 0.01 * torch.rand(()), y


# In both sets


def test_samples_with_the_same_number_in_both_parts_are_found_even_where_they_are_augmented():
    parts = Augmented(TRAIN)
    learn = over(
        DataLoader(Subset(parts, range(800)), 64, shuffle=True), DataLoader(Subset(parts, range(700, 900)), 64)
    )
    finding = found(learn, "no leak")
    assert (finding.verdict, finding.number) == ("fault", 100)


def test_inputs_that_change_cannot_be_compared():
    finding = found(over(DataLoader(Augmented(TRAIN), 64, shuffle=True), DataLoader(VALID, 64)), "no leak")
    assert finding.verdict == "not applicable" and "change from one reading to the next" in finding.text


def test_of_large_sets_the_first_samples_are_compared_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(data_checks, "LOOKED_AT", 100)
    finding = found(digits(), "no leak")
    assert finding.text == "0 of 100 validation inputs are among 100 training inputs (the first 100 of each set)."


def test_one_sample_in_both_is_a_warning():
    x, y = torch.cat([DIGITS.x_train, DIGITS.x_valid[:1]]), torch.cat([DIGITS.y_train, DIGITS.y_valid[:1]])
    finding = found(digits(train=(x, y)), "no leak")
    assert (finding.verdict, finding.number) == ("warning", 1)


# The order


class Stream(IterableDataset):
    def __init__(self, order):
        self.order = order

    def __iter__(self):
        return ((DIGITS.x_train[i], DIGITS.y_train[i]) for i in self.order())


def test_streams_are_read_twice():
    fixed = over(DataLoader(Stream(lambda: range(640)), 64), DataLoader(VALID, 64))
    assert found(fixed, "shuffled").verdict == "warning"
    moving = over(DataLoader(Stream(lambda: torch.randperm(640).tolist()), 64), DataLoader(VALID, 64))
    assert found(moving, "shuffled").verdict == "ok"


def test_a_torch_loader_without_shuffle_is_found():
    assert found(over(DataLoader(TRAIN, 64), DataLoader(VALID, 64)), "shuffled").verdict == "warning"
    assert found(over(DataLoader(TRAIN, 64, shuffle=True), DataLoader(VALID, 64)), "shuffled").verdict == "ok"


def test_one_batch_and_weighted_samples_have_no_order():
    one = digits(train=(DIGITS.x_train[:64], DIGITS.y_train[:64]), shuffle=False)
    assert found(one, "shuffled").verdict == "not applicable"
    weighted = digits(shuffle=False, cbs=ll.WeightedSampling(torch.ones(len(DIGITS.y_train))))
    assert found(weighted, "shuffled").verdict == "not applicable"


# Evaluation


def test_a_shuffled_validation_set_repeats_all_the_same():
    learn = over(DataLoader(TRAIN, 64, shuffle=True), DataLoader(VALID, 64, shuffle=True))
    assert found(learn, "evaluation repeats").verdict == "ok"


def test_augmentation_in_validation_is_found_where_the_seed_is_fixed_too():
    learn = over(DataLoader(TRAIN, 64, shuffle=True), DataLoader(Augmented(VALID), 64))
    learn.dls.seed = 3
    assert found(learn, "evaluation repeats").verdict == "fault"


# Speed


class Slow(Augmented):
    def __getitem__(self, i):
        time.sleep(0.001)
        return self.inner[i]


def test_a_slow_loader_is_a_warning_with_what_to_do():
    finding = found(over(DataLoader(Slow(TRAIN), 32, shuffle=True), DataLoader(VALID, 64)), "loader speed")
    assert finding.verdict == "warning" and finding.number > 0.5
    assert finding.advice == "Read in workers: `num_workers=…`; or read faster."


def test_workers_hide_the_time_of_reading_behind_that_of_training():
    loader = DataLoader(TRAIN, 64, shuffle=True, num_workers=1)
    assert found(over(loader, DataLoader(VALID, 64)), "loader speed").verdict in ("ok", "warning")


# Learning


def test_a_short_time_is_kept_and_said():
    learn = digits(lambda: mlp(Naps()))
    start = time.perf_counter()
    finding = learn.check(only="learning", seconds=0.3)["learning"]
    assert time.perf_counter() - start < 5
    assert int(finding.text.split()[1]) < data_checks.UPDATES


class Naps(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_permuted_labels_are_found_with_other_permutations_too(seed):
    y = DIGITS.y_train[torch.randperm(len(DIGITS.y_train), generator=torch.Generator().manual_seed(seed + 10))]
    assert not digits(train=(DIGITS.x_train, y)).check(only="learning")
