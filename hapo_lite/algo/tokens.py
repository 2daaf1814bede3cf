"""What a method knows about each token before an iteration's first update. All of it is constant in the updates.

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
    """The old policy's entropy and what follows from it.

    h: [B, T]. entropy: [B, T], nats. uncertain: bool [B, T], from `uncertain_tokens`. scale: [B], from
    `advantage.entropy_scale`: the iteration's mean entropy divided by that of each completion (EDGE-GRPO). factor:
    [B, T], on the advantage, from `selection.advantage_factor`; None: 1. drawn: bool [B, T], the tokens that
    `trained_tokens: random` trains; None: no draw, so that all are.
    """

    h: Tensor
    entropy: Tensor
    uncertain: Tensor
    scale: Tensor
    factor: Tensor | None = None
    drawn: Tensor | None = None

    @classmethod
    def of_one(cls, method: Method, signal: EntropySignal, entropy: Tensor) -> TokenSignals:
        """The signals of a single completion, B = 1, with scale 1. entropy: [T], nats."""
        return cls(
            signal.normalize(entropy)[None],
            entropy[None],
            uncertain_tokens(method, signal, entropy)[None],
            torch.ones(1, dtype=entropy.dtype),
        )


def fit_signal(method: Method, entropy: Tensor) -> EntropySignal:
    """The signal fitted to these tokens, normally all tokens of an iteration. entropy: [N], nats."""
    return EntropySignal.fit(entropy, torch.ones_like(entropy), method.quantile, method.floor, method.low_side)


def uncertain_tokens(method: Method, signal: EntropySignal, entropy: Tensor) -> Tensor:
    """Which tokens of one completion lie above the method's quantile of entropy, bool [T]. entropy: [T], nats.

    The quantile is that of the iteration, which `signal` holds, or that of this completion alone. The token at the
    quantile itself counts as certain, so a completion of one token that is measured alone has no uncertain token.
    """
    measured_against = signal if method.uncertain_among == "iteration" else fit_signal(method, entropy)
    return measured_against.above(entropy)


def trained_tokens(method: Method, uncertain: Tensor, truncated: bool = False, drawn: Tensor | None = None) -> Tensor:
    """Which tokens have an advantage and count in the loss; bool, shaped like `uncertain`.

    truncated: the tokens are of a completion that was cut off, of which a method may train none. drawn: bool, the
    tokens that a method which trains random ones has drawn; None: all.
    """
    everything = torch.ones_like(uncertain, dtype=torch.bool)
    if method.leaves_out(truncated):
        return ~everything
    if method.trained_tokens == "uncertain":
        return uncertain.bool()
    if method.trained_tokens == "random" and drawn is not None:
        return drawn.bool()
    return everything
