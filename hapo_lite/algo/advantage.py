"""Group-relative advantages, by sequence (Eq. 1) or by token (Eq. 9), and how methods change them by entropy.

Axes: B completions, T completion tokens. A group is the set of completions of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to the standard deviation, as in Eq. 1 and 9."""
FALLBACK_LIMIT = 5.0
"""A group in which any |A| of Eq. 9 reaches this value uses Eq. 1 instead."""


def group_advantage(
    rewards: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    level: Literal["token", "sequence"] = "token",
    scale: Literal["group", "batch", "none"] = "group",
) -> Tensor:
    """The advantage of each completion within its group. rewards, lengths, group_ids: [B] -> [B], dtype of `rewards`.

    level "sequence": (r - mean) / (sample std + 1e-6) over the group's completions. level "token": the mean and the
    population std are taken over all tokens of the group, so a long completion weighs more and the group's advantages
    sum to zero over its tokens. A group in which any |A| reaches 5 falls back to "sequence". A group whose rewards are
    all equal has A = 0.

    scale says whose standard deviation divides. "group": the group's. "batch": that of all B rewards about their own
    mean (Lite PPO, arXiv 2508.08221), over tokens or over completions as `level` says. "none": r - mean is not divided
    (Dr. GRPO, arXiv 2503.20783), and no group falls back, since the limit is in units of a standard deviation.
    Raises ValueError for an unknown level or scale, unequal shapes or a non-finite reward.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', not {level!r}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be 'group', 'batch' or 'none', not {scale!r}")
    if not rewards.shape == lengths.shape == group_ids.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards, lengths and group_ids must share one shape [B]; they have {tuple(rewards.shape)}, "
            f"{tuple(lengths.shape)} and {tuple(group_ids.shape)}"
        )
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards must be finite")
    advantage = torch.zeros_like(rewards)
    lengths = lengths.to(rewards.dtype)
    batch = _Rewards(rewards, lengths)
    for group in group_ids.unique():
        members = group_ids == group
        own = _Rewards(rewards[members], lengths[members])
        if bool((own.values == own.values[0]).all()):
            continue
        if scale == "none":
            advantage[members] = own.centred(level)
        else:
            advantage[members] = _scaled(own, batch if scale == "batch" else own, level)
    return advantage


def decoupled_advantage(
    rewards: Tensor, weights: Tensor, lengths: Tensor, group_ids: Tensor, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """GDPO's advantage of K rewards (arXiv 2601.05242, Eq. 4-6). rewards: [K, B]; weights: [K]; others: [B] -> [B].

    The advantages of the rewards, each within its group, are summed with their weights and divided by the standard
    deviation of the sum over the batch, + 1e-6. The mean over the batch, which Eq. 6 subtracts, is 0 since that of
    every group is: nothing is subtracted, so a group without a difference has A = 0. level "sequence": the sample
    standard deviation over completions, as in the paper. level "token": Eq. 9 in each group, and the root mean square
    over all tokens; their mean is 0 but for groups that fell back. Raises ValueError as `group_advantage` does.
    """
    apart = torch.stack([group_advantage(reward, lengths, group_ids, level) for reward in rewards])
    total = weights.to(rewards.dtype) @ apart
    by_token = level == "token"
    counts, count = (lengths, lengths.sum()) if by_token else (torch.ones_like(total), max(len(total) - 1, 1))
    return total / (((counts * total.square()).sum() / count).sqrt() + STD_FLOOR)


@dataclass(frozen=True)
class _Rewards:
    """Rewards of completions and their lengths in tokens, [B] each. level: as in `group_advantage`."""

    values: Tensor
    lengths: Tensor

    def centred(self, level: str) -> Tensor:
        """The rewards less their mean, over tokens or over completions: [B]."""
        if level == "sequence":
            return self.values - self.values.mean()
        return self.values - (self._weights * self.values).sum()

    def std(self, level: str) -> Tensor:
        """The population standard deviation over tokens, or the sample one over completions: a scalar."""
        if level == "sequence":
            return self.values.std()
        return (self._weights * self.centred("token").square()).sum().sqrt()

    @property
    def _weights(self) -> Tensor:
        """The share of each completion in the tokens."""
        return self.lengths / self.lengths.sum()


def _scaled(group: _Rewards, measured: _Rewards, level: str) -> Tensor:
    """The group's centred rewards over the standard deviation of `measured`, by sequence where Eq. 9 is extreme."""
    if level == "token":
        advantage = group.centred("token") / (measured.std("token") + STD_FLOOR)
        if float(advantage.abs().max()) < FALLBACK_LIMIT:
            return advantage
    return group.centred("sequence") / (measured.std("sequence") + STD_FLOOR)


def redistribute(
    advantage: Tensor,
    h: Tensor,
    ratio: Tensor,
    eps_low: float | Tensor = 0.2,
    eps_high: float | Tensor = 0.28,
) -> Tensor:
    """Differential redistribution (Eq. 10-11). advantage, h, ratio: [B, T] -> [B, T]; ratio is treated as a constant.

    The neutral zone is [1 - eps_low/2, 1 + eps_high/2]. Two kinds of token get A (1 + h): a token with h > 0 whose
    ratio has left the zone (a decision point that is moving), and a token with h <= 0 whose ratio is inside it (settled
    boilerplate). Every other token keeps A. The paper computes the zone from the base bounds; tensors [B, T] for
    eps_low and eps_high give each token its own zone.
    """
    ratio = ratio.detach()
    inside = (ratio >= 1.0 - eps_low / 2) & (ratio <= 1.0 + eps_high / 2)
    return torch.where((h > 0) ^ inside, advantage * (1.0 + h), advantage)


def entropy_scale(mean_entropy: Tensor, floor: float = 1e-8) -> Tensor:
    """EDGE-GRPO's entropy-driven advantage (arXiv 2507.21848): the factor on each completion's advantage, [B].

    The factor is the average of `mean_entropy` divided by the completion's own value, so a confident completion weighs
    more, whether it is right or wrong. mean_entropy: [B], nats, the mean token entropy of every completion of the
    iteration. A value below `floor` counts as `floor`.
    """
    mean_entropy = mean_entropy.clamp_min(floor)
    return mean_entropy.mean() / mean_entropy


def add_entropy_bonus(advantage: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0) -> Tensor:
    """A + min(alpha * H, |A| / kappa), the entropy-based advantage of arXiv 2506.14758. advantage, entropy: [B, T].

    Both tensors are treated as constants. With kappa > 1 no advantage changes its sign, and an advantage of 0 stays 0.
    """
    return advantage + torch.minimum(alpha * entropy, advantage.abs() / kappa)
