"""Adaptive sampling temperature (Eq. 8): higher for uncertain tokens, lower for certain ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hapo_lite.algo.signal import EntropySignal


def adaptive_temperature(entropy: Tensor, signal: EntropySignal | None, base: float = 1.0, tau: float = 0.05) -> Tensor:
    """T = base * (1 + tau * h), in [base * (1 - tau), base * (1 + tau)], shaped like `entropy`.

    entropy: any shape, nats, computed from `logits / base` before any truncation. signal: the statistics of the
    previous iteration; None, as in the first iteration, gives `base` everywhere.
    """
    if signal is None:
        return torch.full_like(entropy, base)
    return base * (1.0 + tau * signal.normalize(entropy))
