"""Surrogates: what the objective gains by a token that has moved, and where its gradient stops.

Axes: B completions, T completion tokens. r: the ratio of a token's probability to that under the old policy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method


@dataclass(frozen=True)
class Credit:
    """The final advantage of each token, and the bounds on what its surrogate measures, [B, T] each.

    A surrogate without a lower bound has 0, one without an upper bound inf.
    """

    advantage: Tensor
    lower: Tensor
    upper: Tensor

    def where(self, valid: Tensor) -> Credit:
        """The same with zeros where `valid`, bool [B, T], is false."""
        return Credit(*(torch.where(valid, x, 0.0) for x in (self.advantage, self.lower, self.upper)))


@dataclass(frozen=True)
class Moves:
    """How far each token has moved from the old policy, [B, T] each.

    log_ratio: log r, differentiable, 0 where a token does not count. old_logp: 0 there too. valid: bool, whether a
    token counts.
    """

    log_ratio: Tensor
    old_logp: Tensor
    valid: Tensor

    @classmethod
    def of(cls, logp: Tensor, old_logp: Tensor, valid: Tensor) -> Moves:
        """From log-probabilities and a mask, [B, T] each."""
        # A masked position may hold anything, even NaN. Neither the loss nor, through 0 * NaN, the gradient may see it.
        return cls(torch.where(valid, logp - old_logp, 0.0), torch.where(valid, old_logp, 0.0), valid)

    @property
    def ratio(self) -> Tensor:
        """r, differentiable."""
        return self.log_ratio.exp()

    @property
    def unit(self) -> Tensor:
        """1 everywhere, with the gradient of the log-probability: it carries a weight that is a constant."""
        return (self.log_ratio - self.log_ratio.detach()).exp()

    @property
    def sequence_ratio(self) -> Tensor:
        """The geometric mean of r over each completion's tokens, a constant: [B, 1]."""
        # A cumulative sum adds the padding's zeros last, so that the width of the micro-batch changes no bit.
        total = self.log_ratio.detach().double().cumsum(dim=1)[:, -1:]
        return (total / self.valid.sum(dim=1, keepdim=True).clamp_min(1)).exp().to(self.log_ratio.dtype)

    @property
    def probability_change(self) -> Tensor:
        """The token's probability less that under the old policy, a constant."""
        return self.old_logp.exp() * self.log_ratio.detach().expm1()


@dataclass(frozen=True)
class Gain:
    """What the objective gains, and where it was stopped, [B, T] each.

    value: differentiable. stopped_low: bool, whether the lower bound limited the gradient. stopped_high: the same for
    the upper bound or the dual clip. measure: a constant, what was compared with the bounds; None if it was the ratio.
    """

    value: Tensor
    stopped_low: Tensor
    stopped_high: Tensor
    measure: Tensor | None = None


def clipped_gain(ratio: Tensor, credit: Credit, dual_clip: float | None) -> Gain:
    """PPO's min(r A, clip(r, lower, upper) A). For A < 0 it is at least dual_clip * A (None: no limit)."""
    advantage, lower, upper = credit.advantage, credit.lower, credit.upper
    unclipped = ratio * advantage
    clipped = torch.minimum(torch.maximum(ratio, lower), upper) * advantage
    value = torch.minimum(unclipped, clipped)
    stopped_low = (ratio < lower) & (advantage < 0)
    stopped_high = (ratio > upper) & (advantage > 0)
    if dual_clip is not None:
        floor = dual_clip * advantage
        limited = (advantage < 0) & (value < floor)
        value = torch.where(limited, floor, value)
        stopped_high = stopped_high | limited
    return Gain(value, stopped_low, stopped_high)


def sequence_gain(moves: Moves, credit: Credit, dual_clip: float | None) -> Gain:
    """GSPO (arXiv 2507.18071), in its form by token: `clipped_gain` with the completion's ratio for every token.

    Each token's log-probability carries the gradient, so a mean over the completion's tokens has the gradient of the
    completion's own term.
    """
    ratio = moves.sequence_ratio
    gain = clipped_gain(ratio * moves.unit, credit, dual_clip)
    return replace(gain, measure=ratio.expand_as(gain.value))


def cispo_gain(moves: Moves, credit: Credit) -> Gain:
    """CISPO (arXiv 2506.13585, Eq. 4-5): A log p, weighed by the constant min(r, upper). No token loses its gradient.

    The value is min(r, upper) A, which has the same gradient. stopped_high: the tokens whose weight `upper` limits.
    """
    ratio = moves.ratio.detach()
    value = torch.minimum(ratio, credit.upper) * moves.unit * credit.advantage
    capped = (ratio > credit.upper) & (credit.advantage != 0)
    return Gain(value, torch.zeros_like(capped), capped)


def sapo_gain(moves: Moves, credit: Credit, gate_positive: float, gate_negative: float) -> Gain:
    """SAPO (arXiv 2511.20347): A (4 / tau) sigmoid(tau (r - 1)). tau: gate_positive for A > 0, else gate_negative.

    Its slope in log p is A at r = 1 and fades on both sides, so nothing is stopped.
    """
    ratio = moves.ratio
    tau = torch.full_like(ratio, gate_negative).masked_fill(credit.advantage > 0, gate_positive)
    value = 4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * credit.advantage
    nothing = torch.zeros_like(moves.valid)
    return Gain(value, nothing, nothing)


def dppo_gain(moves: Moves, credit: Credit, largest_weight: float | None) -> Gain:
    """DPPO with total variation (arXiv 2602.04879): A log p, weighed by r, while the probability has moved little.

    A token is left out if its probability has moved by more than delta in the direction in which A pushes it. The
    bounds are on 1 + p - p_old: they are 1 - delta and 1 + delta. largest_weight: what r is limited to as a weight
    (None: no limit).
    """
    measure = 1.0 + moves.probability_change
    stopped_low = (measure < credit.lower) & (credit.advantage < 0)
    stopped_high = (measure > credit.upper) & (credit.advantage > 0)
    weight = moves.ratio.detach().clamp_max(largest_weight or float("inf"))
    value = torch.where(stopped_low | stopped_high, 0.0, weight * moves.unit * credit.advantage)
    return Gain(value, stopped_low, stopped_high, measure)


def surrogate_gain(method: Method, moves: Moves, credit: Credit) -> Gain:
    """What the objective gains under the method's surrogate."""
    if method.surrogate == "sequence":
        return sequence_gain(moves, credit, method.dual_clip)
    if method.surrogate == "cispo":
        return cispo_gain(moves, credit)
    if method.surrogate == "sapo":
        return sapo_gain(moves, credit, method.gate_positive, method.gate_negative)
    if method.surrogate == "dppo":
        return dppo_gain(moves, credit, method.dual_clip)
    return clipped_gain(moves.ratio, credit, method.dual_clip)
