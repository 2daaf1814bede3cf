"""avg@k, pass@k, maj@k and bootstrap intervals, against cases worked by hand and enumerations."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_lite.train.intervals import (
    Interval,
    avg_at_k,
    bootstrap_interval,
    macro_interval,
    maj_at_k,
    paired_interval,
    pass_at_k,
    unpaired_interval,
)

grids = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=4)
)


def test_avg_is_the_share_of_each_prompt():
    assert avg_at_k([[1, 1, 0, 0], [0, 0, 0, 1]]).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("samples", "k", "expected"),
    [
        # 5 samples, 2 right, k = 2: of C(5,2) = 10 pairs, C(3,2) = 3 hold no right one.
        ([1, 0, 1, 0, 0], 2, 0.7),
        # 4 samples, 1 right, k = 2: 1 - C(3,2) / C(4,2) = 1 - 3/6.
        ([0, 0, 0, 1], 2, 0.5),
        # 8 samples, 3 right, k = 4: 1 - C(5,4) / C(8,4) = 1 - 5/70.
        ([1, 1, 1, 0, 0, 0, 0, 0], 4, 65 / 70),
        # 3 wrong ones cannot fill k = 4.
        ([1, 0, 0, 0], 4, 1.0),
        ([0, 0, 0, 0], 4, 0.0),
        ([1, 0, 0, 0], 1, 0.25),
    ],
)
def test_pass_at_k_by_hand(samples, k, expected):
    assert pass_at_k([samples], k) == pytest.approx([expected], abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(grids)
def test_pass_at_k_is_the_mean_over_all_subsets(grid):
    for k in range(1, len(grid[0]) + 1):
        naive = [np.mean([max(chosen) for chosen in combinations(row, k)]) for row in grid]
        assert pass_at_k(grid, k) == pytest.approx(naive, abs=1e-12)


def test_pass_at_k_with_many_samples_does_not_overflow():
    grid = np.zeros((1, 2000))
    grid[0, :3] = 1
    expected = 1 - comb(1997, 1000) / comb(2000, 1000)
    assert pass_at_k(grid, 1000) == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize(
    ("correct", "votes", "k", "expected"),
    [
        # 7 twice, 3 twice: a tie of two, one of which is right.
        ([1, 1, 0, 0], ["7", "7", "3", "3"], 4, 0.5),
        # Right answers are one vote, however they are written: 2 against 1 and 1.
        ([1, 1, 0, 0], ["1/2", "0.5", "3", "4"], 4, 1.0),
        # Blocks (7, 3) and (3, 3): a tie, then a wrong majority: (1/2 + 0) / 2.
        ([1, 0, 0, 0], ["7", "3", "3", "3"], 2, 0.25),
        # The fifth sample has no block of two left and is not used.
        ([1, 1, 1, 1, 0], ["7", "7", "7", "7", "3"], 2, 1.0),
        # Samples without an answer do not vote: one right vote is a majority.
        ([1, 0, 0, 0], ["7", None, None, None], 4, 1.0),
        ([0, 0, 0, 0], [None, None, None, None], 4, 0.0),
        # Three answers once each: a third.
        ([1, 0, 0], ["7", "3", "4"], 3, 1 / 3),
        # A wrong answer that is spelt like the mark of the right ones is still wrong.
        ([0, 0, 1], ["True", "True", "7"], 3, 0.0),
    ],
)
def test_maj_at_k_by_hand(correct, votes, k, expected):
    assert maj_at_k([correct], [votes], k) == pytest.approx([expected])


@given(grids)
def test_one_sample_passes_and_wins_as_often_as_it_is_right(grid):
    votes = [[str(i) for i in range(len(row))] for row in grid]
    assert pass_at_k(grid, 1) == pytest.approx(avg_at_k(grid))
    assert maj_at_k(grid, votes, 1) == pytest.approx(avg_at_k(grid))


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_a_mistake(k):
    with pytest.raises(ValueError, match="from 1 to the number of samples, 3"):
        pass_at_k([[1, 0, 0]], k)
    with pytest.raises(ValueError, match="from 1 to the number of samples, 3"):
        maj_at_k([[1, 0, 0]], [["1", "2", "3"]], k)


@pytest.mark.parametrize(
    ("level", "low", "high"),
    [
        # Of three draws from (0, 0, 3) the number of 3s is binomial(3, 1/3): the mean is 0, 1, 2, 3 with probability
        # 8/27, 12/27, 6/27, 1/27, cumulated .296, .741, .963, 1.
        (0.95, 0.0, 3.0),
        (0.90, 0.0, 2.0),
        (0.30, 1.0, 1.0),
    ],
)
def test_an_interval_by_hand(level, low, high):
    assert bootstrap_interval([0, 0, 3], level) == Interval(1.0, low, high)


def test_an_interval_has_the_quantiles_of_all_resamples():
    values = np.array([0.1, 0.9, 0.4, 0.35, 0.7])
    means = np.array([np.mean(draw) for draw in product(values, repeat=5)])  # all 3,125 of them
    found = bootstrap_interval(values, resamples=200_000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.004)


def test_intervals_are_seeded_and_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    assert bootstrap_interval(rng.normal(size=20), seed=1) == bootstrap_interval(
        np.random.default_rng(0).normal(size=20), seed=1
    )
    found = [bootstrap_interval(rng.normal(2.0, 1.0, 40), resamples=400, seed=i) for i in range(400)]
    assert sum(v.low <= 2.0 <= v.high for v in found) / 400 == pytest.approx(0.94, abs=0.03)


def test_groups_weigh_alike_and_are_drawn_apart():
    # (0, 2) gives 0, 1, 2 with probability 1/4, 1/2, 1/4, and (6, 6, 6) gives 6: the mean of both is 3, 3.5 or 4.
    assert macro_interval([[0, 2], [6, 6, 6]]) == Interval(3.5, 3.0, 4.0)
    assert macro_interval([[0, 2], [6, 6, 6]], level=0.4) == Interval(3.5, 3.5, 3.5)


def test_many_prompts_are_drawn_in_parts_and_agree_with_the_normal_approximation():
    values = np.random.default_rng(0).random(50_000)
    found = bootstrap_interval(values, resamples=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 50_000**0.5, rel=0.1)


def test_pairing_takes_out_what_the_prompts_add():
    easy = np.random.default_rng(0).random(30)
    found = paired_interval(easy, easy + 0.1)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.above_zero and not found.below_zero
    # By hand: differences (1, 0) are drawn as (0, 0), (0, 1), (1, 0), (1, 1).
    assert paired_interval([0, 1], [1, 1]) == Interval(0.5, 0.0, 1.0)
    assert not paired_interval([0, 1], [1, 1]).above_zero
    assert paired_interval([0.3, 0.5], [0.2, 0.1]).below_zero


def test_an_unpaired_difference_by_hand():
    # 2 less the mean of two draws from (0, 1), which is 0, 0.5 or 1 with probability 1/4, 1/2, 1/4.
    assert unpaired_interval([0, 1], [2, 2, 2]) == Interval(1.5, 1.0, 2.0)
    assert unpaired_interval([0, 1], [2, 2, 2], level=0.4) == Interval(1.5, 1.5, 1.5)


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0], [[1.0]]])
def test_an_interval_needs_values(values):
    with pytest.raises(ValueError, match="list of finite values"):
        bootstrap_interval(values)


def test_a_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="as many values on both sides"):
        paired_interval([1.0], [1.0, 2.0])
