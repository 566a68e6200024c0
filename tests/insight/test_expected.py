"""What losses should be, compared with closed forms."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import learnloop as ll
from learnloop.insight.expected import Kind, kind_of, knowing_all, knowing_nothing, name_of

CLASSES = torch.arange(12) % 4
LABELS = (torch.arange(24).reshape(6, 4) % 2).float()


def loss_of_nothing(loss_func, pred, y):
    return float(loss_func(knowing_nothing(kind_of(loss_func), pred, y), y))


@pytest.mark.parametrize(
    "loss_func", [nn.CrossEntropyLoss(), F.cross_entropy, ll.CrossEntropyLossFlat(), ll.LabelSmoothingCrossEntropy()]
)
def test_equal_logits_have_the_logarithm_of_the_number_of_classes(loss_func):
    assert loss_of_nothing(loss_func, torch.randn(12, 4), CLASSES) == pytest.approx(math.log(4))


def test_equal_log_probabilities_too():
    assert loss_of_nothing(nn.NLLLoss(), torch.randn(12, 4), CLASSES) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    "loss_func", [nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, nn.BCELoss(), ll.BCEWithLogitsLossFlat()]
)
def test_labels_have_the_logarithm_of_two(loss_func):
    assert loss_of_nothing(loss_func, torch.rand(6, 4), LABELS) == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss_func", [nn.MSELoss(), F.mse_loss, ll.MSELossFlat(), ll.mse])
def test_numbers_have_the_variance_of_the_targets(loss_func):
    y = torch.randn(50, 1) * 3 + 7
    assert loss_of_nothing(loss_func, torch.zeros(50, 1), y) == pytest.approx(float(y.var(correction=0)), rel=1e-4)


def test_a_loss_of_ones_own_is_not_known():
    assert kind_of(lambda pred, y: pred.sum()) is None
    assert name_of(partial(partial(F.mse_loss), reduction="sum")) == "mse_loss"
    assert kind_of(partial(F.mse_loss, reduction="sum")) is Kind.NUMBERS


def test_the_lowest_loss_is_zero_and_with_label_smoothing_the_entropy_of_the_smoothed_targets():
    pred = torch.randn(12, 4)
    assert knowing_all(nn.CrossEntropyLoss(), Kind.CLASSES, pred, CLASSES) == pytest.approx(0, abs=1e-4)
    p = torch.tensor([0.925, 0.025, 0.025, 0.025])
    entropy = float(-(p * p.log()).sum())
    found = knowing_all(nn.CrossEntropyLoss(label_smoothing=0.1), Kind.CLASSES, pred, CLASSES)
    assert found == pytest.approx(entropy, rel=0.05)
    assert knowing_all(nn.MSELoss(), Kind.NUMBERS, pred, pred) == 0
