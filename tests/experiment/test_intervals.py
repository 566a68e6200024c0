"""Intervals of paired differences, beside published tables and scipy."""

import math

import pytest

from learnloop.experiment.intervals import Difference, paired, student_quantile


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        # the table of Student's t in NIST's handbook, 1.3.6.7.2
        (0.95, 1, 6.314),
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.99, 7, 2.998),
        (0.995, 30, 2.750),
        (0.975, 100, 1.984),
    ],
)
def test_quantiles_are_those_of_the_table(p, df, expected):
    assert student_quantile(p, df) == pytest.approx(expected, abs=5e-4)


def test_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 5, 8, 29, 30, 999, 1000):
        for p in (0.51, 0.8, 0.975, 0.9995):
            assert student_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-10)


@pytest.mark.parametrize(("p", "df"), [(0.5, 3), (1.0, 3), (0.9, 0)])
def test_other_quantiles_are_refused(p, df):
    with pytest.raises(ValueError, match=r"pass a probability between 0\.5 and 1, and 1 degree or more"):
        student_quantile(p, df)


def test_the_interval_is_that_of_the_paired_t_test():
    # differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t of 2 degrees 4.3027
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.30265272991 / math.sqrt(3)
    assert found == pytest.approx((2.0, 2 - half, 2 + half, 3))


def test_what_all_pairs_have_in_common_takes_nothing_from_the_certainty():
    far_apart = [0.0, 10.0, -20.0, 5.0]
    found = paired([x + 1 + e for x, e in zip(far_apart, (0.01, -0.01, 0.02, -0.02), strict=True)], far_apart)
    assert 0.95 < found.low < 1 < found.high < 1.05


def test_one_pair_says_nothing_of_the_spread():
    assert paired([3.0], [1.0]) == (2.0, -math.inf, math.inf, 1)
    assert paired([3.0], [1.0]).is_noise


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match="there is no pair to compare"):
        paired([], [])


def test_it_may_be_noise_where_the_interval_has_0_in_it():
    assert Difference(0.1, -0.1, 0.3, 5).is_noise
    assert not Difference(0.1, 0.01, 0.3, 5).is_noise
    assert not Difference(-0.1, -0.3, -0.01, 5).is_noise
