"""How sure a difference is: the mean of paired differences with its interval by Student's t."""

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Difference", "paired", "student_quantile"]


class Difference(NamedTuple):
    """The mean of paired differences, and the interval that covers the true one with the given confidence."""

    mean: float
    low: float  # -inf and inf where one pair says nothing of the spread
    high: float
    n: int  # pairs

    @property
    def is_noise(self) -> bool:
        """Whether no difference at all would do as well."""
        return self.low <= 0 <= self.high


def paired(
    values: Sequence[float],
    reference: Sequence[float],  # one for each of `values`
    confidence: float = 0.95,
) -> Difference:
    """The interval of Student's t over `values - reference`; ValueError where there is no pair.

    It covers the true mean in the share `confidence` of studies where differences are normal and independent.
    """
    import statistics  # not before: it brings fractions and decimals along

    differences = [a - b for a, b in zip(values, reference, strict=True)]
    n = len(differences)
    if n == 0:
        raise ValueError("there is no pair to compare: pass values of the same seeds.")
    mean = statistics.fmean(differences)
    if n == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    half = student_quantile((1 + confidence) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def student_quantile(
    p: float,  # from 0.5 to 1, both excluded
    df: int,  # degrees of freedom, from 1 up
) -> float:
    """The value that Student's t with `df` degrees of freedom stays below with probability `p`.

    By bisection of the finite sums for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    if not 0.5 < p < 1 or df < 1:
        raise ValueError(f"`student_quantile({p}, {df})`: pass a probability between 0.5 and 1, and 1 degree or more.")
    low, high = 0.0, 1.0
    while (1 + _within(high, df)) / 2 < p:
        low, high = high, 2 * high
    for _ in range(80):  # to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _within(middle, df)) / 2 < p else (low, middle)
    return high


def _within(t: float, df: int) -> float:
    """The probability of a value between `-t` and `t`."""
    angle = math.atan(t / math.sqrt(df))
    cos_squared, is_odd = math.cos(angle) ** 2, df % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + is_odd, df - 1, 2):
        term *= cos_squared * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
