"""The clipped policy loss with a given denominator, and what a method gives each token on the way to it.

Axes: B completions, T completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hapo_lite.algo.advantage import add_entropy_bonus, redistribute
from hapo_lite.algo.clipping import clip_bounds, grouped_bounds
from hapo_lite.algo.methods import Method
from hapo_lite.algo.tokens import TokenSignals, trained_tokens


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar. ratio: [B, T], detached; valid, clipped_low, clipped_high: bool [B, T].

    clipped_low (clipped_high) marks the tokens whose gradient the lower (upper) bound, or the dual clip, has stopped.
    kl_base: divergence from the base model, nats, [B, T], detached; None without one.
    """

    loss: Tensor
    ratio: Tensor
    valid: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl_base: Tensor | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Means over this call's tokens: ratio, clipped shares, and the KL divergence from the old policy, nats.

        The divergence is the estimator r - 1 - log r (Schulman, "Approximating KL divergence", 2020), never negative.
        """
        ratio = self.ratio[self.valid].double()
        if ratio.numel() == 0:
            return {"ratio": 1.0, "kl_old": 0.0, "clipped_low": 0.0, "clipped_high": 0.0}
        return {
            "ratio": float(ratio.mean()),
            "kl_old": float((ratio - 1.0 - ratio.log()).mean()),
            "clipped_low": float(self.clipped_low[self.valid].double().mean()),
            "clipped_high": float(self.clipped_high[self.valid].double().mean()),
        }


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    lower: Tensor,
    upper: Tensor,
    denominator: Tensor | float,
    dual_clip: float | None = 10.0,
    importance: Tensor | None = None,
    base_logp: Tensor | None = None,
    kl_weight: Tensor | float = 0.0,
) -> PolicyLoss:
    """DAPO's surrogate: -min(r A, clip(r, lower, upper) A), weighted by `mask` and divided by `denominator`.

    logp, old_logp, advantage, mask, lower, upper: [B, T]. `mask` may hold weights, such as 1 / length for a mean over
    sequences. `denominator` belongs to the optimiser step, not to this call: the sum over all its micro-batches of
    `mask.sum()`, so that the gradient does not depend on how the step is cut. dual_clip: for A < 0 the loss is at most
    -dual_clip * A (None: no limit). importance: [B, T] weights, treated as constants. base_logp: [B, T], the base
    model's; each token then also costs kl_weight (a number or [B, T]) times its divergence from the base, estimated by
    exp(x) - x - 1 with x = base_logp - logp (Schulman, "Approximating KL divergence", 2020), through which the gradient
    flows.
    """
    weights = mask.to(logp.dtype)
    valid = mask != 0
    # A masked position may hold anything, NaN included: it must not reach the loss or, through 0 * NaN, the gradient.
    log_ratio = torch.where(valid, logp - old_logp, 0.0)
    advantage, lower, upper = (torch.where(valid, x, 0.0) for x in (advantage, lower, upper))
    ratio = log_ratio.exp()
    unclipped = ratio * advantage
    clipped = torch.minimum(torch.maximum(ratio, lower), upper) * advantage
    gain = torch.minimum(unclipped, clipped)
    stopped_low = (ratio < lower) & (advantage < 0)
    stopped_high = (ratio > upper) & (advantage > 0)
    if dual_clip is not None:
        floor = dual_clip * advantage
        limited = (advantage < 0) & (gain < floor)
        gain = torch.where(limited, floor, gain)
        stopped_high = stopped_high | limited
    if importance is not None:
        gain = gain * torch.where(valid, importance.detach(), 0.0)
    kl_base = None
    if base_logp is not None:
        to_base = torch.where(valid, base_logp - logp, 0.0)
        kl_base = to_base.expm1() - to_base
        gain = gain - kl_weight * kl_base
        kl_base = kl_base.detach()
    loss = -(weights * gain).sum() / denominator
    return PolicyLoss(loss, ratio.detach(), valid, stopped_low & valid, stopped_high & valid, kl_base)


@dataclass(frozen=True)
class Credit:
    """What each token is given: its advantage in the end, and the bounds on its ratio; all [B, T]."""

    advantage: Tensor
    lower: Tensor
    upper: Tensor


def assign_credit(method: Method, advantage: Tensor, tokens: TokenSignals, ratio: Tensor) -> Credit:
    """From one advantage a completion, [B], or a token, [B, T], to a token's own, and its bounds. ratio: [B, T]."""
    h = tokens.h
    if method.eps_uncertain is not None:
        ranges = method.eps_low, method.eps_high, method.eps_uncertain
        lower, upper = grouped_bounds(tokens.uncertain, *ranges, dtype=h.dtype)
    else:
        lower, upper = clip_bounds(h if method.adaptive_clip else torch.zeros_like(h), method.eps_low, method.eps_high)
    spread = advantage[:, None].expand_as(h) if advantage.dim() == 1 else advantage
    if method.entropy_scale:
        spread = spread * tokens.scale[:, None]
    if method.entropy_bonus > 0.0:
        spread = add_entropy_bonus(spread, tokens.entropy, method.entropy_bonus, method.entropy_bonus_limit)
    if method.redistribution:
        zone = (method.eps_low, method.eps_high) if method.neutral_zone == "base" else (1.0 - lower, upper - 1.0)
        spread = redistribute(spread, h, ratio, *zone)
    return Credit(torch.where(trained_tokens(method, tokens.uncertain), spread, 0.0), lower, upper)


def loss_weights(
    mask: Tensor, average: Literal["token", "sequence"] = "token", trained: Tensor | None = None
) -> Tensor:
    """Weight of each token in the loss, [B, T].

    "token": 1 each, so that long completions weigh more (DAPO). "sequence": 1 / length, so that completions weigh the
    same (GRPO); the length counts the tokens of `trained` alone, bool [B, T], where it is given.
    """
    weights = mask.to(torch.float32)
    if average == "token":
        return weights
    counted = weights if trained is None else weights * trained
    return weights / counted.sum(dim=1, keepdim=True).clamp_min(1.0)


def loss_denominator(trained_counts: Tensor, average: Literal["token", "sequence"] = "token") -> float:
    """What an optimiser step's loss is divided by. trained_counts: [B], of all the step's completions.

    "token": their trained tokens. "sequence": the completions that have any. Never 0, so that a step in which no token
    is trained has loss 0.
    """
    count = trained_counts.sum() if average == "token" else (trained_counts > 0).sum()
    return float(count.clamp_min(1))


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a micro-batch is computed from besides the log-probabilities that are learned: all constants.

    old_logp: [B, T]. advantage: [B], or [B, T]. weights: [B, T] from `loss_weights`. sampling_logp: [B, T], under the
    distribution that the tokens were drawn from; `importance: truncated` needs it. base_logp: [B, T], of the base
    model; a weight on the divergence from it needs it.
    """

    old_logp: Tensor
    advantage: Tensor
    tokens: TokenSignals
    weights: Tensor
    sampling_logp: Tensor | None = None
    base_logp: Tensor | None = None


def method_loss(
    method: Method, logp: Tensor, inputs: LossInputs, denominator: Tensor | float
) -> tuple[PolicyLoss, Credit]:
    """The loss of one micro-batch under `method`. logp: [B, T]. Raises ValueError for an input that is missing."""
    old_logp, tokens = inputs.old_logp, inputs.tokens
    ratio = torch.where(inputs.weights != 0, logp.detach() - old_logp, 0.0).exp()
    credit = assign_credit(method, inputs.advantage, tokens, ratio)
    importance = None
    if method.importance == "truncated":
        if inputs.sampling_logp is None:
            raise ValueError("importance: truncated needs the sampling log-probabilities")
        importance = (old_logp - inputs.sampling_logp).exp().clamp_max(method.importance_cap)
    if method.needs_base and inputs.base_logp is None:
        raise ValueError("kl_certain and kl_uncertain need the base model's log-probabilities")
    loss = policy_loss(
        logp,
        old_logp,
        credit.advantage,
        inputs.weights,
        credit.lower,
        credit.upper,
        denominator,
        dual_clip=method.dual_clip,
        importance=importance,
        base_logp=inputs.base_logp if method.needs_base else None,
        kl_weight=torch.full_like(logp, method.kl_certain).masked_fill(tokens.uncertain, method.kl_uncertain),
    )
    return loss, credit
