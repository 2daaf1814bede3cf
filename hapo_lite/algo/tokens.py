"""What a method knows of the tokens before an iteration's first update: all of the old policy, all constants.

Axes: B completions, T completion tokens, N = tokens flattened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.signal import EntropySignal


@dataclass(frozen=True)
class TokenSignals:
    """h: [B, T]. entropy: [B, T], nats. uncertain: bool [B, T], see `uncertain_tokens`.

    scale: [B], the iteration's mean entropy over each completion's own (EDGE-GRPO).
    """

    h: Tensor
    entropy: Tensor
    uncertain: Tensor
    scale: Tensor

    @classmethod
    def of_one(cls, method: Method, signal: EntropySignal, entropy: Tensor) -> TokenSignals:
        """Of one completion by itself, as if it were as uncertain as the iteration's mean. entropy: [T]."""
        return cls(
            signal.normalize(entropy)[None],
            entropy[None],
            uncertain_tokens(method, signal, entropy)[None],
            torch.ones(1, dtype=entropy.dtype),
        )


def fit_signal(method: Method, entropy: Tensor) -> EntropySignal:
    """The signal over some tokens, normally all of an iteration. entropy: [N], nats."""
    return EntropySignal.fit(entropy, torch.ones_like(entropy), method.quantile, method.floor, method.low_side)


def uncertain_tokens(method: Method, signal: EntropySignal, entropy: Tensor) -> Tensor:
    """Which tokens of one completion lie above the method's quantile of entropy, bool [T]. entropy: [T], nats.

    Measured against the iteration, through its signal, or against the completion alone. The quantile is the nearest
    rank and the token at it is certain, so a completion of one token has no uncertain one.
    """
    return (signal if method.uncertain_among == "iteration" else fit_signal(method, entropy)).above(entropy)


def trained_tokens(method: Method, uncertain: Tensor) -> Tensor:
    """Which tokens the method gives an advantage, and counts in the loss; bool, like `uncertain`."""
    return uncertain.bool() if method.trained_tokens == "uncertain" else torch.ones_like(uncertain, dtype=torch.bool)
