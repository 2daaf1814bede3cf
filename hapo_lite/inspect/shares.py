"""Shares of right answers with intervals: of one share, and of a weighted sum of shares, such as a difference.

A share of few continuations is often 0 or 1, where the usual interval has a width of 0. These intervals do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from hapo_lite.train.intervals import LEVEL, Interval


def share_interval(right: int, count: int, level: float = LEVEL) -> Interval:
    """right / count with Wilson's score interval (Wilson 1927). Raises ValueError unless 0 <= right <= count > 0."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"a share needs 0 <= right <= count and a count above 0, not {right} of {count}")
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    share, spread = right / count, z * z / count
    middle = (share + spread / 2.0) / (1.0 + spread)
    reach = z / (1.0 + spread) * math.sqrt(share * (1.0 - share) / count + spread / (4.0 * count))
    # Rounding must not put an end that is 0 or 1 on the other side of the share.
    return Interval(share, min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach)))


def weighted_sum(weights: Sequence[float], parts: Sequence[Interval]) -> Interval:
    """The sum of weight x value over independent parts, with its interval from the intervals of the parts.

    Each end adds up in squares how far the parts reach to that side (Zou, Huang and Zhang 2009, for any weights). With
    the weights 1 and -1 it is Newcombe's interval for a difference of two shares (Newcombe 1998, method 10).
    """
    value, below, above = 0.0, 0.0, 0.0
    for weight, part in zip(weights, parts, strict=True):
        ends = sorted((weight * part.low, weight * part.high))
        value += weight * part.value
        below += (weight * part.value - ends[0]) ** 2
        above += (ends[1] - weight * part.value) ** 2
    return Interval(value, value - math.sqrt(below), value + math.sqrt(above))


def difference(one: Interval, other: Interval) -> Interval:
    """one - other, of two independent shares, with Newcombe's interval."""
    return weighted_sum((1.0, -1.0), (one, other))
