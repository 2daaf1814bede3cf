"""Accuracy of a model and its uncertainty: avg@k, pass@k, maj@k and bootstrap intervals. NumPy only.

Axes: P prompts (or seeds), n samples per prompt. Every function is deterministic; the bootstrap is seeded.
scipy.stats.bootstrap gives the same intervals to the last bit, but refuses a single value, and scipy takes 140 MB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it, in the unit of the averaged values."""

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0.0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0.0


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


def bootstrap_interval(values: ArrayLike, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of [P] values, one a prompt or seed, with its percentile bootstrap interval (Efron 1979).

    Prompts are drawn with replacement, so the interval holds for other prompts of the same kind. A prompt's samples
    stay together in its value. The interval has two limits. Values that are all equal give a width of 0. Few values
    give an interval that is too narrow: of 95 % intervals of normal values, 85 % hold the truth at P = 5, 90 % at 10
    and 94 % at 30. Raises ValueError without values.
    """
    return macro_interval([values], level, resamples, seed)


def macro_interval(
    groups: Sequence[ArrayLike], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean over groups (suites) of each group's mean, with its interval. groups: [P_i] values each.

    Each group's prompts are resampled within the group.
    """
    rng = np.random.default_rng(seed)
    samples = [np.asarray(values, dtype=np.float64) for values in groups]
    means = np.mean([_resampled_means(sample, resamples, rng) for sample in samples], axis=0)
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(np.mean([sample.mean() for sample in samples])), float(low), float(high))


def _resampled_means(sample: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"an interval needs a list of finite values, not one of shape {sample.shape}")
    at_once = max(1, _DRAWS_AT_ONCE // sample.size)
    return np.concatenate(
        [
            sample[rng.integers(sample.size, size=(min(at_once, resamples - done), sample.size))].mean(axis=1)
            for done in range(0, resamples, at_once)
        ]
    )


def paired_interval(
    before: ArrayLike, after: ArrayLike, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of after - before, [P] each, over the same prompts (or seeds) in the same order, with its interval.

    A prompt's difficulty cancels in the difference, so the interval is narrower than two separate intervals suggest.
    Raises ValueError if the two differ in length.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a paired difference needs as many values on both sides, not {first.shape}, {second.shape}")
    return bootstrap_interval(second - first, level, resamples, seed)


def unpaired_interval(
    before: ArrayLike, after: ArrayLike, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """mean(after) - mean(before) of [P] and [Q] values that are not paired, with its interval."""
    rng = np.random.default_rng(seed)
    first, second = (np.asarray(values, dtype=np.float64) for values in (before, after))
    change = -_resampled_means(first, resamples, rng) + _resampled_means(second, resamples, rng)
    low, high = np.quantile(change, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(second.mean() - first.mean()), float(low), float(high))


def _samples(correct: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(correct, dtype=np.float64)
    if samples.ndim != 2 or samples.size == 0:
        raise ValueError(f"expected [prompts, samples] with at least one of each, not shape {samples.shape}")
    return samples


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of samples, {n}, not {k}")
