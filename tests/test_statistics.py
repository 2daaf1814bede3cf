"""avg@k, pass@k, maj@k and t intervals, against cases worked by hand, tables, enumerations and simulations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_lite.train.intervals import (
    Interval,
    avg_at_k,
    macro_interval,
    maj_at_k,
    mean_interval,
    paired_interval,
    pass_at_k,
    student_quantile,
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
    ("freedom", "level", "quantile"),
    # Two-sided quantiles as tables of Student's distribution print them.
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (9, 0.99, 3.250), (30, 0.90, 1.697), (1e6, 0.95, 1.960)],
)
def test_quantiles_by_the_table(freedom, level, quantile):
    assert student_quantile(freedom, level) == pytest.approx(quantile, abs=6e-4)


def test_an_interval_by_hand():
    # Of 1, 2, 6 the mean is 3, the variance (4 + 1 + 9) / 2 = 7, and the mean's standard error sqrt(7 / 3).
    found = mean_interval([1, 2, 6])
    reach = 4.302653 * (7 / 3) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - reach, 3.0 + reach))


def test_groups_weigh_alike():
    # Half of (0, 2) has variance 2 / 2 / 4 and one degree of freedom, half of (5, 6, 7) has 1 / 3 / 4 and two:
    # together 1/3, with (1/3)^2 / ((1/4)^2 / 1 + (1/12)^2 / 2) = 16/9 / (1 + 1/18) = 32/19 degrees of freedom.
    found = macro_interval([[0, 2], [5, 6, 7]])
    reach = student_quantile(32 / 19, 0.95) * (1 / 3) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((3.5, 3.5 - reach, 3.5 + reach))


def test_pairing_takes_out_what_the_prompts_add():
    easy = np.random.default_rng(0).random(30)
    found = paired_interval(easy, easy + 0.1)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.above_zero and not found.below_zero
    # By hand: the differences 1 and 0 have the mean 1/2 and its standard error 1/2.
    found = paired_interval([0, 1], [1, 1])
    assert (found.low, found.high) == pytest.approx((0.5 - 12.7062 / 2, 0.5 + 12.7062 / 2), abs=1e-4)
    assert not found.above_zero
    assert paired_interval([0.3, 0.5, 0.6], [0.2, 0.41, 0.5]).below_zero


def test_an_unpaired_difference_by_hand():
    # Welch: variances of the means 1/2 / 2 and 1 / 3, one and two degrees of freedom.
    found = unpaired_interval([0, 1], [2, 3, 4])
    variance = 1 / 4 + 1 / 3
    freedom = variance**2 / ((1 / 4) ** 2 / 1 + (1 / 3) ** 2 / 2)
    reach = student_quantile(freedom, 0.95) * variance**0.5
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - reach, 2.5 + reach))


def normal(rng: np.random.Generator, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Two arms that differ by 1, with what the seeds add to both and what they add to each."""
    shared = rng.normal(size=seeds)
    return shared + rng.normal(size=seeds), shared + 1.0 + rng.normal(size=seeds)


def accuracies(rng: np.random.Generator, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies on 128 prompts with 8 samples, of 0.85 and 0.9 in the mean, which runs scatter around."""
    rates = np.clip(rng.normal([[0.85], [0.9]], 0.02, size=(2, seeds)), 0.0, 1.0)
    before, after = rng.binomial(1024, rates) / 1024
    return before, after


@pytest.mark.parametrize(("draw", "truth"), [(normal, 1.0), (accuracies, 0.05)])
@pytest.mark.parametrize("seeds", [3, 4, 5, 7, 10])
def test_an_interval_over_seeds_holds_the_truth_as_often_as_it_says(seeds: int, draw: Callable, truth: float):
    rng = np.random.default_rng(seeds)
    found = [paired_interval(*draw(rng, seeds)) for _ in range(4000)]
    held = sum(each.low <= truth <= each.high for each in found) / len(found)
    # The simulation's standard error is 0.34 %.
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize(("prompts", "solved"), [(64, 0.98), (96, 0.97), (128, 0.99)])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("comparisons", [1, 11])
def test_equal_methods_on_a_coarse_grid_are_told_apart_no_more_often_than_it_says(seeds, prompts, solved, comparisons):
    """pass@n near 1: few values are possible, so two or three differences are often the same."""
    rng = np.random.default_rng(seeds)
    counts = rng.binomial(prompts, solved, size=(4000, 2, seeds)) / prompts
    level = 1.0 - 0.05 / comparisons
    found = [paired_interval(before, after, level, step=1 / prompts) for before, after in counts]
    marked = sum(each.excludes_zero for each in found) / len(found)
    # Two standard errors of the simulation.
    assert marked <= 1.0 - level + 2.0 * ((1.0 - level) * level / len(found)) ** 0.5


@pytest.mark.parametrize(
    ("prompts", "won", "lost"),
    [(10, 0.1, 0.1), (32, 0.02, 0.0), (32, 0.03, 0.01), (64, 0.02, 0.0), (64, 0.03, 0.01), (256, 0.1, 0.04)],
)
def test_an_interval_over_prompts_holds_the_truth_where_few_prompts_change(prompts, won, lost):
    """pass@n: a prompt is newly solved or lost with small probabilities. Without the step it is 48 % for (32, 0.02)."""
    rng = np.random.default_rng(0)
    drawn = rng.random((2000, prompts))
    changes = (drawn < won).astype(float) - (drawn > 1.0 - lost)
    found = [paired_interval(np.zeros(prompts), change, step=1.0) for change in changes]
    assert sum(each.low <= won - lost <= each.high for each in found) / len(found) >= 0.94
    assert all(each.low < each.high for each in found)


@pytest.mark.parametrize(("prompts", "n"), [(2, 1), (2, 4), (2, 8), (4, 4), (8, 2), (64, 4)])
def test_an_unchanged_policy_is_said_to_change_no_more_often_than_promised(prompts, n):
    """avg@n of few prompts: without the step, two of them differ alike in up to 12 % of cases."""
    rng = np.random.default_rng(0)
    right = rng.binomial(n, 0.5, size=(2000, 2, prompts)) / n
    marked = sum(paired_interval(*each, step=1.0 / n).excludes_zero for each in right) / 2000
    assert marked <= 0.05 + 2.0 * (0.05 * 0.95 / 2000) ** 0.5


def test_a_step_widens_an_interval_by_hand():
    # Both differences are 0.1. To their variance 0.02^2 / 2 is added, and t with one degree of freedom is 12.706.
    found = paired_interval([0.3, 0.5], [0.4, 0.6], step=0.02)
    assert (found.value, found.high) == pytest.approx((0.1, 0.1 + 12.7062 * 0.02 / 2), abs=1e-5)


def test_a_single_value_has_no_interval():
    found = mean_interval([0.4])
    assert not (found.known or found.above_zero or found.below_zero)
    assert found.as_json() == {"value": 0.4, "low": None, "high": None}
    assert not macro_interval([[0.4], [0.1, 0.2, 0.3]]).known
    # Two equal values have one, without width unless a step is given.
    assert mean_interval([0.4, 0.4]) == Interval(0.4, 0.4, 0.4)
    assert mean_interval([0.4, 0.4], step=0.1).high == pytest.approx(0.4 + 12.7062 * 0.1 / 2, abs=1e-5)


def test_a_share_has_no_interval_beyond_0_and_1():
    found = mean_interval([1.0, 1.0, 1.0, 0.5])
    assert found.high > 1.0
    assert found.within(0.0, 1.0) == Interval(found.value, found.low, 1.0)
    assert not mean_interval([0.5]).within(0.0, 1.0).known


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0], [[1.0]]])
def test_an_interval_needs_values(values):
    with pytest.raises(ValueError, match="list of finite values"):
        mean_interval(values)


def test_a_paired_difference_needs_pairs():
    with pytest.raises(ValueError, match="as many values on both sides"):
        paired_interval([1.0], [1.0, 2.0])
