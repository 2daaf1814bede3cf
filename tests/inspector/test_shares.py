"""Intervals of shares: the worked examples of Newcombe's two papers of 1998, and how often they hold the truth."""

from __future__ import annotations

import itertools
import math

import pytest

from hapo_lite.inspect.shares import difference, share_interval, weighted_sum
from hapo_lite.train.intervals import Interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_the_interval_of_the_table(right, count, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    found = share_interval(right, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    mirrored = share_interval(count - right, count)
    assert (mirrored.low, mirrored.high) == pytest.approx((1.0 - found.high, 1.0 - found.low))


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_a_difference_has_the_interval_of_the_table(one, other, low, high):
    """Newcombe 1998, "Interval estimation for the difference between independent proportions", table II, method 10."""
    found = difference(share_interval(*one), share_interval(*other))
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_a_weighted_sum_holds_the_truth_as_often_as_it_says():
    """0.7 p - 0.3 q over every outcome of 12 and 24 draws, each with its binomial probability."""

    def chances(p: float, count: int) -> list[float]:
        return [math.comb(count, k) * p**k * (1.0 - p) ** (count - k) for k in range(count + 1)]

    coverage = []
    for p, q in itertools.product((0.05, 0.2, 0.5, 0.7, 0.95), repeat=2):
        held = 0.0
        for k, chance in enumerate(chances(p, 12)):
            for m, other in enumerate(chances(q, 24)):
                found = weighted_sum((0.7, -0.3), (share_interval(k, 12), share_interval(m, 24)))
                held += chance * other * (found.low <= 0.7 * p - 0.3 * q <= found.high)
        coverage.append(held)
    assert 0.94 < sum(coverage) / len(coverage) < 0.97 and min(coverage) > 0.9


def test_a_part_that_is_known_adds_no_width():
    share = share_interval(5, 10)
    assert weighted_sum((1.0, -0.5), (share, Interval(1.0, 1.0, 1.0))).low == pytest.approx(share.low - 0.5)
    assert share_interval(7, 7).high == 1.0 and share_interval(0, 7).low == 0.0
    for wrong in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="a share needs"):
            share_interval(*wrong)
