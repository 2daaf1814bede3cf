"""Accuracy of a model and its uncertainty: avg@k, pass@k, maj@k, and Student's t intervals.

Axes: P prompts (or seeds), n samples per prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import mpmath
import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
"""How often an interval holds the truth."""
_MANY = 5_000
"""Degrees of freedom from which the normal quantile stands for Student's: at 95 % it is smaller by 1 part in 4,000."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it, in the unit of the averaged values.

    A single value has no spread that could be estimated: its interval reaches from -inf to inf.
    """

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the interval has ends."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def within(self, least: float, most: float) -> Interval:
        """The interval without what lies beyond the values that the quantity can take, such as 0 and 1 for a share."""
        if not self.known:
            return self
        return Interval(self.value, max(self.low, least), min(self.high, most))

    def as_json(self) -> dict[str, float | None]:
        """The three numbers by name; an end that is not known is None."""
        if self.known:
            return {"value": self.value, "low": self.low, "high": self.high}
        return {"value": self.value, "low": None, "high": None}

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0.0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0.0

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval is on one side of 0."""
        return self.above_zero or self.below_zero


def avg_at_k(correct: ArrayLike) -> NDArray[np.float64]:
    """[P, n] 0 or 1 -> [P]: each prompt's share of correct samples. Its expectation is the same for every k."""
    return _samples(correct).mean(axis=1)


def pass_at_k(correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """[P, n] 0 or 1 -> [P]: the probability that k of the n samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k), unbiased for any n >= k (Chen et al. 2021, arXiv 2107.03374, Eq. 1). Raises ValueError
    unless 1 <= k <= n.
    """
    samples = _samples(correct)
    n = samples.shape[1]
    _check_k(k, n)
    wrong = n - samples.sum(axis=1)
    # C(w, k) / C(n, k) factor by factor, so that no binomial coefficient overflows; w < k gives a factor of 0.
    steps = np.arange(k)
    return 1.0 - (np.maximum(wrong[:, None] - steps, 0.0) / (n - steps)).prod(axis=1)


def beyond_more_attempts(before: ArrayLike, after: ArrayLike) -> NDArray[np.float64]:
    """[P] and [P] numbers of right answers, each in n attempts at the same prompts -> [P] values.

    Their mean is the rise of pass@n, less what more attempts could have solved before. If training only makes every
    prompt r = avg@n after / avg@n before times as likely to be solved, it solves what r n attempts would have solved.
    pass@k is concave in k, so these solve at most n (r - 1) times as many more as the last of n attempts did. That
    attempt's share is 1 / n of the prompts that are solved exactly once (Good 1953; Efron and Thisted 1976). So the
    mean is the rise of pass@n less (r - 1) times the share of these prompts. Where nothing was solved before, r has no
    bound, and the values are 0. Each value has its prompt's effect on r (the delta method), so that the values spread
    as their mean does.
    """
    first, last = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if not first.any():
        return np.zeros(len(first))
    rise = (last > 0).astype(np.float64) - (first > 0)
    once = (first == 1).astype(np.float64)
    factor = last.mean() / first.mean()
    effect = (last - factor * first) / first.mean()
    return rise - (factor - 1.0) * once - once.mean() * effect


def maj_at_k(correct: ArrayLike, votes: Sequence[Sequence[Hashable]], k: int) -> NDArray[np.float64]:
    """[P, n] 0 or 1, and a vote for each sample -> [P]: how often the most frequent answer of k samples is correct.

    The mean over the n // k disjoint blocks of k consecutive samples is an unbiased estimate. All correct samples count
    as one answer, however they write it. The other samples count by their vote, and None abstains. A tie earns the
    share of the tied answers that is correct. A block without votes earns 0. Raises ValueError unless 1 <= k <= n.
    """
    samples = _samples(correct)
    n = samples.shape[1]
    _check_k(k, n)
    starts = range(0, n - k + 1, k)
    return np.array(
        [
            np.mean([_majority(right[s : s + k], given[s : s + k]) for s in starts])
            for right, given in zip(samples > 0.5, votes, strict=True)
        ]
    )


def _majority(right: NDArray[np.bool_], given: Sequence[Hashable]) -> float:
    """The share of the most frequent answers that is correct; 0 without votes."""
    correct_votes = int(right.sum())
    wrong_votes = Counter(vote for ok, vote in zip(right, given, strict=True) if not ok and vote is not None)
    most = max([correct_votes, *wrong_votes.values()])
    if most == 0 or correct_votes < most:
        return 0.0
    return 1.0 / (1 + sum(count == most for count in wrong_votes.values()))


def mean_interval(values: ArrayLike, level: float = LEVEL, step: float = 0.0) -> Interval:
    """The mean of [P] values, one a prompt or seed, with Student's t interval (Student 1908).

    The interval is about the mean over all prompts of the same kind. A prompt's samples stay together in its value. Of
    95 % intervals of normally distributed values, 95 % hold the truth at every P from 2 on. A single value gives an
    interval without ends.

    step: the smallest difference between two values, such as 1/128 for a share of 128 prompts, or 1 for right or wrong.
    Few values on a coarse grid are often equal by chance, and would have no width. So the squared deviations are
    summed as if one value more differed by a step, half up and half down, which adds step^2 / P to the variance (after
    Agresti and Min 2005, who add half a pair to each cell of a table of pairs). Raises ValueError without values.
    """
    return _combined([_Sample.of(values, 1.0, step)], level)


def macro_interval(groups: Sequence[ArrayLike], level: float = LEVEL, step: float = 0.0) -> Interval:
    """The mean over groups (suites) of each group's mean, with its t interval. groups: [P_i] values each.

    step: as of `mean_interval`.
    """
    weight = 1.0 / len(groups)
    return _combined([_Sample.of(values, weight, step) for values in groups], level)


def paired_interval(before: ArrayLike, after: ArrayLike, level: float = LEVEL, step: float = 0.0) -> Interval:
    """The mean of after - before, [P] each, over the same prompts (or seeds) in the same order, with its t interval.

    A prompt's difficulty cancels in the difference, so the interval is narrower than two separate intervals suggest.
    step: as of `mean_interval`. Raises ValueError if the two differ in length.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs as many values on both sides, not {first.shape}, {second.shape}")
    return mean_interval(second - first, level, step)


def unpaired_interval(before: ArrayLike, after: ArrayLike, level: float = LEVEL) -> Interval:
    """mean(after) - mean(before) of [P] and [Q] values that are not paired, with Welch's t interval (Welch 1947)."""
    return _combined([_Sample.of(before, -1.0), _Sample.of(after, 1.0)], level)


class _Sample(NamedTuple):
    """A weighted mean of P values. variance: that of the weighted mean, inf for one value; freedom: P - 1."""

    mean: float
    variance: float
    freedom: int

    @classmethod
    def of(cls, values: ArrayLike, weight: float, step: float = 0.0) -> _Sample:
        """step: as of `mean_interval`. Raises ValueError unless the values are finite, and a list."""
        sample = np.asarray(values, dtype=np.float64)
        if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
            raise ValueError(f"an interval needs a list of finite values, not one of shape {sample.shape}")
        variance = math.inf
        if sample.size > 1:
            variance = weight**2 * (float(sample.var(ddof=1)) + step**2 / sample.size) / sample.size
        return cls(weight * float(sample.mean()), variance, sample.size - 1)


def _combined(samples: Sequence[_Sample], level: float) -> Interval:
    """The sum of independent means with its t interval, degrees of freedom by Welch and Satterthwaite (1946)."""
    value = sum(sample.mean for sample in samples)
    variance = sum(sample.variance for sample in samples)
    if math.isinf(variance):
        return Interval(value, -math.inf, math.inf)
    if variance == 0.0:
        return Interval(value, value, value)
    # A share of the variance, and no square of it, so that tiny variances do not vanish.
    freedom = 1.0 / sum((sample.variance / variance) ** 2 / sample.freedom for sample in samples)
    reach = student_quantile(freedom, level) * math.sqrt(variance)
    return Interval(value, value - reach, value + reach)


@lru_cache(maxsize=1024)
def student_quantile(freedom: float, level: float) -> float:
    """The t with P(|T| <= t) = level, for Student's distribution with that many degrees of freedom.

    P(|T| > t) is the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2),
    which rises in x (Abramowitz and Stegun 26.7.1 and 26.5.27).
    """
    if freedom > _MANY:
        return NormalDist().inv_cdf((1.0 + level) / 2.0)
    low, high = 0.0, 1.0
    for _ in range(52):
        x = (low + high) / 2.0
        if mpmath.betainc(freedom / 2.0, 0.5, 0, x, regularized=True) < 1.0 - level:
            low = x
        else:
            high = x
    return math.sqrt(freedom * (1.0 - x) / x)


def _samples(correct: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(correct, dtype=np.float64)
    if samples.ndim != 2 or samples.size == 0:
        raise ValueError(f"expected [prompts, samples] with at least one of each, not shape {samples.shape}")
    return samples


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of samples, {n}, not {k}")
