"""The entropy signal h (Eq. 5-6): how uncertain a token is compared with the other tokens of its iteration.

Axes: B sequences (completions), T completion tokens. Entropy in nats, over the full vocabulary, at the base
temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class EntropySignal:
    """Statistics of log-entropy over a set of tokens (the scope), normally all completion tokens of an iteration.

    pivot: the rho-quantile of log H, in log-nats. high, low: how far log H reaches above and below the pivot, >= 0.
    sigma: root mean square of log H about the pivot; it cancels in h. floor: nats, a lower entropy counts as this.
    low_side: the sign of h below the pivot. "positive" is what HAPO's public code computes, h / min(h).
    """

    pivot: float
    sigma: float
    high: float
    low: float
    floor: float = 1e-8
    low_side: Literal["negative", "positive"] = "negative"

    @classmethod
    def fit(
        cls,
        entropy: Tensor,
        mask: Tensor,
        quantile: float = 0.8,
        floor: float = 1e-8,
        low_side: Literal["negative", "positive"] = "negative",
    ) -> EntropySignal:
        """Fit the signal to the tokens where `mask` is true. entropy, mask: [B, T], or any one shape.

        The quantile is that of the nearest rank, at sorted position round(quantile * (n - 1)), so the pivot is the
        log-entropy of a real token. Statistics are computed in float64. Raises ValueError for an empty scope, a
        non-finite or negative entropy, or a quantile outside [0, 1].
        """
        if not 0.0 <= quantile <= 1.0:
            raise ValueError(f"quantile must lie in [0, 1], not {quantile}")
        scope = entropy[mask.bool()].double()
        if scope.numel() == 0:
            raise ValueError("the entropy signal needs at least one token; the mask selects none")
        if not bool(torch.isfinite(scope).all()) or bool((scope < 0).any()):
            raise ValueError("the entropy signal needs finite, non-negative entropies")
        log_entropy = scope.clamp_min(floor).log().sort().values
        pivot = log_entropy[round(quantile * (scope.numel() - 1))]
        return cls(
            pivot=float(pivot),
            sigma=float((log_entropy - pivot).square().mean().sqrt()),
            high=float(log_entropy[-1] - pivot),
            low=float(pivot - log_entropy[0]),
            floor=floor,
            low_side=low_side,
        )

    def above(self, entropy: Tensor) -> Tensor:
        """Whether log H lies above the pivot; bool, like `entropy`."""
        return entropy.double().clamp_min(self.floor).log() > self.pivot

    def normalize(self, entropy: Tensor) -> Tensor:
        """h in [-1, 1], shaped like `entropy`: positive above the pivot, 1 at the largest entropy, -1 at the smallest.

        Largest and smallest refer to the tokens of the fit; an entropy beyond them is clamped. h is 0 on a side of the
        pivot where the fit had no token. With low_side "positive", h is 1 at the smallest entropy too. The computation
        is in float64, as in `fit`, so the ends are exact, and with low_side "negative" the tokens of the fit that have
        h > 0 are those for which `above` is true.
        """
        distance = entropy.double().clamp_min(self.floor).log() - self.pivot
        above = distance / self.high if self.high > 0 else torch.zeros_like(distance)
        below = distance / self.low if self.low > 0 else torch.zeros_like(distance)
        if self.low_side == "positive":
            below = -below
        return torch.where(distance > 0, above, below).clamp(-1.0, 1.0).to(entropy.dtype)
