"""Group-relative advantages: by sequence (Eq. 1), by token (Eq. 9), and what methods make of them by entropy.

Axes: B completions, T completion tokens. A group is the set of completions of one prompt.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to the standard deviation, as in Eq. 1 and 9."""
FALLBACK_LIMIT = 5.0
"""Eq. 9 is left for Eq. 1 in a group where any |A| reaches this."""


def group_advantage(
    rewards: Tensor, lengths: Tensor, group_ids: Tensor, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """Advantage of each completion against its group. rewards, lengths, group_ids: [B] -> [B], dtype of `rewards`.

    "sequence": (r - mean) / (sample std + 1e-6) over the group's completions. "token": mean and population std over all
    tokens of the group, so that a long completion weighs more and the group's advantages sum to zero over its tokens;
    a group in which any |A| reaches 5 falls back to "sequence". A group whose rewards are all equal has A = 0.
    Raises ValueError on another level, unequal shapes, or a non-finite reward.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', not {level!r}")
    if not rewards.shape == lengths.shape == group_ids.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards, lengths and group_ids must share one shape [B]; they have {tuple(rewards.shape)}, "
            f"{tuple(lengths.shape)} and {tuple(group_ids.shape)}"
        )
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards must be finite")
    advantage = torch.zeros_like(rewards)
    for group in group_ids.unique():
        members = group_ids == group
        advantage[members] = _one_group(rewards[members], lengths[members].to(rewards.dtype), level)
    return advantage


def _one_group(rewards: Tensor, lengths: Tensor, level: str) -> Tensor:
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    if level == "token":
        weights = lengths / lengths.sum()
        centred = rewards - (weights * rewards).sum()
        advantage = centred / ((weights * centred.square()).sum().sqrt() + STD_FLOOR)
        if float(advantage.abs().max()) < FALLBACK_LIMIT:
            return advantage
    return (rewards - rewards.mean()) / (rewards.std() + STD_FLOOR)


def redistribute(
    advantage: Tensor,
    h: Tensor,
    ratio: Tensor,
    eps_low: float | Tensor = 0.2,
    eps_high: float | Tensor = 0.28,
) -> Tensor:
    """Differential redistribution (Eq. 10-11). advantage, h, ratio: [B, T] -> [B, T]; ratio is treated as a constant.

    A (1 + h) for a token with h > 0 whose ratio has left the neutral zone [1 - eps_low/2, 1 + eps_high/2] (a decision
    point that is moving) and for a token with h <= 0 whose ratio is inside it (settled boilerplate); A otherwise.
    The paper's zone uses the base bounds; tensors [B, T] give one of its own to each token.
    """
    ratio = ratio.detach()
    inside = (ratio >= 1.0 - eps_low / 2) & (ratio <= 1.0 + eps_high / 2)
    return torch.where((h > 0) ^ inside, advantage * (1.0 + h), advantage)


def entropy_scale(mean_entropy: Tensor, floor: float = 1e-8) -> Tensor:
    """EDGE-GRPO's entropy-driven advantage (arXiv 2507.21848): the factor on each completion's advantage, [B].

    The mean over completions of their mean entropies, over the completion's own: a sure completion weighs more, right
    or wrong. mean_entropy: [B], nats, of all completions of the iteration; below `floor` they count as `floor`.
    """
    mean_entropy = mean_entropy.clamp_min(floor)
    return mean_entropy.mean() / mean_entropy


def add_entropy_bonus(advantage: Tensor, entropy: Tensor, alpha: float = 0.4, kappa: float = 2.0) -> Tensor:
    """A + min(alpha * H, |A| / kappa), the entropy-based advantage of arXiv 2506.14758. All [B, T], constants.

    With kappa > 1 no advantage changes its sign, and one of 0 stays 0.
    """
    return advantage + torch.minimum(alpha * entropy, advantage.abs() / kappa)
