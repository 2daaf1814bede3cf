"""Group advantages worked by hand, and the cases that groups come in."""

import math

import pytest
import torch

from hapo_lite.algo.advantage import decoupled_advantage, group_advantage, redistribute


def advantage(rewards, lengths, groups, level, scale="group"):
    return group_advantage(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths), torch.tensor(groups), level, scale
    )


def test_token_level_by_hand():
    # Tokens: one of reward 1, three of reward 0. mean = 1/4, population std = sqrt(1/4 * 3/4) = sqrt(3)/4.
    a = advantage([1.0, 0.0], [1, 3], [7, 7], "token")
    std = math.sqrt(3) / 4 + 1e-6
    assert a.tolist() == pytest.approx([0.75 / std, -0.25 / std])


def test_sequence_level_by_hand():
    # mean = 1/3, sample std = sqrt((4/9 + 1/9 + 1/9) / 2) = sqrt(1/3).
    a = advantage([1.0, 0.0, 0.0], [5, 1, 9], [0, 0, 0], "sequence")
    std = math.sqrt(1 / 3) + 1e-6
    assert a.tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std])


def test_token_level_sums_to_zero_over_tokens():
    lengths = [3, 17, 5, 11]
    a = advantage([0.3, 1.0, -0.5, 0.0], lengths, [0] * 4, "token")
    assert float((a * torch.tensor(lengths)).sum()) == pytest.approx(0.0, abs=1e-9)


def test_extreme_groups_fall_back_to_sequence_level():
    # One right token against 99 wrong ones: A = 0.99 / sqrt(0.01 * 0.99) = 9.9 >= 5.
    rewards, lengths = [1.0, 0.0, 0.0], [1, 50, 49]
    assert torch.equal(advantage(rewards, lengths, [0] * 3, "token"), advantage(rewards, lengths, [0] * 3, "sequence"))


@pytest.mark.parametrize(("wrong", "falls_back"), [(26, True), (25, False)])
def test_a_group_falls_back_from_five_on(wrong, falls_back):
    # One right token against n wrong ones: mean 1 / (n + 1), std sqrt(n) / (n + 1), so A = sqrt(n), times
    # 1 / (1 + 1e-6 / std). It is 5.099 for n = 26, and 4.99997 for n = 25.
    rewards, lengths = [1.0, 0.0, 0.0], [1, wrong - 12, 12]
    std = math.sqrt(wrong) / (wrong + 1) + 1e-6
    by_token = [wrong / (wrong + 1) / std, -1 / (wrong + 1) / std, -1 / (wrong + 1) / std]
    by_sequence = [2 / 3 / (math.sqrt(1 / 3) + 1e-6)] + [-1 / 3 / (math.sqrt(1 / 3) + 1e-6)] * 2
    expected = by_sequence if falls_back else by_token
    assert advantage(rewards, lengths, [0] * 3, "token").tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_equal_rewards_and_singletons_give_zero(level):
    a = advantage([0.1, 0.1, 0.1, 1.0], [2, 3, 4, 5], [0, 0, 0, 1], level)
    assert a.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_groups_may_be_interleaved_and_named_anyhow(level):
    rewards, lengths = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [3, 5, 2, 7, 4, 6]
    apart = advantage(rewards, lengths, [0, 0, 0, 1, 1, 1], level)
    order = [3, 0, 4, 1, 5, 2]
    mixed = advantage([rewards[i] for i in order], [lengths[i] for i in order], [-4, 900] * 3, level)
    assert torch.equal(mixed, apart[order])


# Two groups: rewards 1 and 0 of 1 and 3 tokens, rewards 3 and 1 of 2 tokens each.
TWO_GROUPS = [1.0, 0.0, 3.0, 1.0], [1, 3, 2, 2], [0, 0, 1, 1]


def test_scaled_by_the_batch_over_completions_by_hand():
    # Group means 0.5 and 2. All four about 1.25: squares 0.0625, 1.5625, 3.0625, 0.0625, sum 4.75, over 4 - 1.
    std = math.sqrt(4.75 / 3) + 1e-6
    a = advantage(*TWO_GROUPS, "sequence", "batch")
    assert a.tolist() == pytest.approx([0.5 / std, -0.5 / std, 1 / std, -1 / std])


def test_scaled_by_the_batch_over_tokens_by_hand():
    # Group means over tokens 1/4 and 2. Over all 8 tokens: mean (1 + 6 + 2) / 8 = 9/8, mean square (1 + 18 + 2) / 8 =
    # 21/8, variance 168/64 - 81/64 = 87/64.
    std = math.sqrt(87) / 8 + 1e-6
    a = advantage(*TWO_GROUPS, "token", "batch")
    assert a.tolist() == pytest.approx([0.75 / std, -0.25 / std, 1 / std, -1 / std])


@pytest.mark.parametrize(
    ("level", "expected"), [("sequence", [0.5, -0.5, 1.0, -1.0]), ("token", [0.75, -0.25, 1.0, -1.0])]
)
def test_without_scale_the_advantage_is_the_centred_reward(level, expected):
    assert advantage(*TWO_GROUPS, level, "none").tolist() == pytest.approx(expected)
    # No standard deviation, no limit in units of it: 10 less the mean over tokens 0.1, though that is above 5.
    if level == "token":
        assert advantage([10.0, 0.0], [1, 99], [0, 0], level, "none").tolist() == pytest.approx([9.9, -0.1])


def test_extreme_groups_fall_back_under_the_batchs_scale_too():
    # Over 100 tokens A = 0.99 / sqrt(0.0099) >= 5 for the first; over completions (1 - 1/3) / sqrt(1/3). The second
    # group's rewards are all equal; they count in the batch: five rewards, mean 1/5, squares 0.64 + 4 * 0.04, over 4.
    rewards, lengths, groups = [1.0, 0.0, 0.0, 0.0, 0.0], [1, 50, 49, 1, 1], [0, 0, 0, 1, 1]
    std = math.sqrt(0.8 / 4) + 1e-6
    a = advantage(rewards, lengths, groups, "token", "batch")
    assert a.tolist() == pytest.approx([2 / 3 / std, -1 / 3 / std, -1 / 3 / std, 0.0, 0.0])


def decoupled(rewards, weights, lengths, groups, level):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (rewards, weights)]
    return decoupled_advantage(*numbers, torch.tensor(lengths), torch.tensor(groups), level).tolist()


def test_normalising_each_reward_by_hand():
    # GDPO's own example: two groups of two, the sums of their two rewards 0 and 2, 0 and 1. Of the sums GRPO makes
    # -+0.707 in both. Each reward apart: -+0.707 twice in the first, -+0.707 once in the second. Squares of the four
    # sums: 2 + 2 + 0.5 + 0.5, over 4 - 1.
    rewards, groups = [[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], [0, 0, 1, 1]
    root, std = math.sqrt(2), math.sqrt(5 / 3)
    expected = [-root / std, root / std, -root / 2 / std, root / 2 / std]
    assert decoupled(rewards, [1.0, 1.0], [9, 9, 9, 9], groups, "sequence") == pytest.approx(expected, rel=1e-5)
    assert len({round(abs(a), 4) for a in advantage([0.0, 2.0, 0.0, 1.0], [9] * 4, groups, "sequence").tolist()}) == 1


def test_normalising_each_reward_over_tokens_by_hand():
    # Tokens 1 and 3: the first reward has A = 0.75 / (sqrt(3) / 4) = sqrt(3) and -1 / sqrt(3), the second the negative
    # of it. With weights 1 and 1/2 half is left; its mean square over 4 tokens is (3/4 + 3 * 1/12) / 4 = 1/4.
    found = decoupled([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.5], [1, 3], [0, 0], "token")
    assert found == pytest.approx([math.sqrt(3), -1 / math.sqrt(3)], rel=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_group_without_a_difference_stays_at_zero_when_each_is_normalised(level):
    rewards = [[0.1, 0.1, 0.3, 0.7, 0.2], [0.7, 0.7, 0.1, 0.1, 0.9]]
    groups, lengths = [4, 4, 2, 2, 2], [3, 5, 7, 1, 2]
    found = decoupled(rewards, [0.3, 0.9], lengths, groups, level)
    assert found[:2] == [0.0, 0.0] and all(found[2:])
    # In any order, at any positive scale of a reward, and with any common factor of the weights.
    order = [3, 0, 4, 1, 2]
    mixed = [[100.0 * r[i] for i in order] for r in rewards]
    again = decoupled(mixed, [3.0, 9.0], [lengths[i] for i in order], [groups[i] for i in order], level)
    assert again == pytest.approx([found[i] for i in order], rel=1e-4)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="level"):
        advantage([1.0], [1], [0], "batch")
    with pytest.raises(ValueError, match="scale"):
        advantage([1.0], [1], [0], "token", "sequence")
    with pytest.raises(ValueError, match="share one shape"):
        advantage([1.0, 2.0], [1], [0, 0], "token")
    with pytest.raises(ValueError, match="finite"):
        advantage([math.nan, 1.0], [1, 1], [0, 0], "token")


def test_redistribution_by_hand():
    # Zone [0.9, 1.14]. Columns: decision inside, decision outside, settled inside, settled outside, at the zone's edge.
    h = torch.tensor([[0.5, 0.5, -0.5, -0.5, 0.5]], dtype=torch.float64)
    ratio = torch.tensor([[1.0, 1.2, 1.0, 0.8, 0.9]], dtype=torch.float64)
    out = redistribute(torch.full_like(h, 2.0), h, ratio)
    assert out.tolist() == [[2.0, 3.0, 1.0, 2.0, 2.0]]


def test_redistribution_takes_no_gradient_through_the_ratio():
    ratio = torch.tensor([[1.5]], requires_grad=True)
    assert not redistribute(torch.ones(1, 1), torch.ones(1, 1), ratio).requires_grad
