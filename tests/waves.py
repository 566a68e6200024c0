"""Predictions and targets for the tests of metrics, in three batches of different size, the same on every machine."""

import math

import torch

SIZES = (7, 5, 8)


def wave(*shape, start=0):
    return torch.sin(torch.arange(start, start + math.prod(shape)).float() * 1.3 + 0.5).view(*shape)


def classes(c):
    """Scores of `c` classes, and class numbers."""
    return [(wave(n, c, start=n) * 2, (torch.arange(n) * 7 // 3 + n) % c) for n in SIZES]


def labels():
    """Scores of three labels, and 0 or 1 for each."""
    return [(wave(n, 3, start=n) * 2, (wave(n, 3, start=2 * n + 1) > 0).float()) for n in SIZES]


def numbers(width=1):
    """Predicted and true numbers that agree roughly."""
    return [(wave(n, width, start=n), wave(n, width, start=n + 1) * 0.5 + wave(n, width, start=n) * 0.7) for n in SIZES]


def positive():
    return [(wave(n, 1, start=n) + 2, wave(n, 1, start=n + 1) + 2) for n in SIZES]


def images(c):
    """Scores of `c` classes for each of 4 x 4 pixels, and class numbers; batches of two and three."""
    return [(wave(n, c, 4, 4, start=n), ((torch.arange(n * 16) * 5 // 3 + n) % c).view(n, 4, 4)) for n in (2, 3)]
