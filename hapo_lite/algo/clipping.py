"""Bounds on the probability ratio: asymmetric adaptive clipping (Eq. 12-13), and Archer's two fixed ranges."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_bounds(h: Tensor, eps_low: float = 0.2, eps_high: float = 0.28) -> tuple[Tensor, Tensor]:
    """The lower and the upper bound on the probability ratio, each shaped like h.

    h <= 0: lower = 1 - eps_low * (1 - h), upper = 1 + eps_high.
    h > 0:  lower = 1 - eps_low,           upper = 1 + eps_high * (1 + h).
    The probability of a certain token may thus fall further, and that of an uncertain token may rise further. With
    h = 0 these are the fixed bounds of PPO (eps_low = eps_high) and DAPO (clip-higher).
    """
    lower = 1.0 - eps_low * (1.0 - h.clamp_max(0.0))
    upper = 1.0 + eps_high * (1.0 + h.clamp_min(0.0))
    return lower, upper


def grouped_bounds(
    uncertain: Tensor, eps_low: float, eps_high: float, eps_uncertain: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Archer's lower and upper bound (arXiv 2507.15778, Sect. 3), [B, T] each. uncertain: bool [B, T].

    An uncertain token has the range [1 - eps_uncertain, 1 + eps_uncertain], which is normally the wider one. A certain
    token has [1 - eps_low, 1 + eps_high].
    """

    def bound(if_certain: float, if_uncertain: float) -> Tensor:
        return torch.full_like(uncertain, if_certain, dtype=dtype).masked_fill(uncertain, if_uncertain)

    lower = bound(1.0 - eps_low, 1.0 - eps_uncertain)
    upper = bound(1.0 + eps_high, 1.0 + eps_uncertain)
    return lower, upper
