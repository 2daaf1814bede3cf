"""Asymmetric adaptive clipping (Eq. 12-13): noise may fall fast, decisions may grow far. Archer's bounds by group."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_bounds(h: Tensor, eps_low: float = 0.2, eps_high: float = 0.28) -> tuple[Tensor, Tensor]:
    """Lower and upper bound on the probability ratio, each shaped like h.

    h <= 0: lower = 1 - eps_low * (1 - h), upper = 1 + eps_high.
    h > 0:  lower = 1 - eps_low,           upper = 1 + eps_high * (1 + h).
    With h = 0 these are the fixed bounds of PPO (eps_low = eps_high) and DAPO (clip-higher).
    """
    lower = 1.0 - eps_low * (1.0 - h.clamp_max(0.0))
    upper = 1.0 + eps_high * (1.0 + h.clamp_min(0.0))
    return lower, upper


def grouped_bounds(
    uncertain: Tensor, eps_low: float, eps_high: float, eps_uncertain: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Archer (arXiv 2507.15778, Sect. 3): two clip ranges, a looser one for uncertain tokens. uncertain: bool [B, T].

    [1 - eps_uncertain, 1 + eps_uncertain] for them, [1 - eps_low, 1 + eps_high] for the others.
    """

    def bound(certain: float, other: float) -> Tensor:
        return torch.full_like(uncertain, certain, dtype=dtype).masked_fill(uncertain, other)

    return bound(1.0 - eps_low, 1.0 - eps_uncertain), bound(1.0 + eps_high, 1.0 + eps_uncertain)
