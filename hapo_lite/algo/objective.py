"""The clipped policy loss with a given denominator, and the methods as settings of the same pieces.

Axes: B completions, T completion tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hapo_lite.algo.advantage import redistribute
from hapo_lite.algo.clipping import clip_bounds


@dataclass(frozen=True)
class PolicyLoss:
    """loss: scalar. ratio: [B, T], detached; valid, clipped_low, clipped_high: bool [B, T].

    clipped_low (clipped_high) marks the tokens whose gradient the lower (upper) bound, or the dual clip, has stopped.
    """

    loss: Tensor
    ratio: Tensor
    valid: Tensor
    clipped_low: Tensor
    clipped_high: Tensor

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
) -> PolicyLoss:
    """DAPO's surrogate: -min(r A, clip(r, lower, upper) A), weighted by `mask` and divided by `denominator`.

    logp, old_logp, advantage, mask, lower, upper: [B, T]. `mask` may hold weights, such as 1 / length for a mean over
    sequences. `denominator` belongs to the optimiser step, not to this call: the sum over all its micro-batches of
    `mask.sum()`, so that the gradient does not depend on how the step is cut. dual_clip: for A < 0 the loss is at most
    -dual_clip * A (None: no limit). importance: [B, T] weights, treated as constants.
    """
    weights = mask.to(logp.dtype)
    valid = mask != 0
    # A masked position may hold anything, NaN included: it must not reach the loss or, through 0 * NaN, the gradient.
    log_ratio = torch.where(valid, logp - old_logp, 0.0)
    advantage = torch.where(valid, advantage, 0.0)
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
    loss = -(weights * gain).sum() / denominator
    return PolicyLoss(loss, ratio.detach(), valid, stopped_low & valid, stopped_high & valid)


def _option(default, meaning: str):
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Method:
    """Which of the paper's pieces are on (A-D), and their constants. `PRESETS` names the usual combinations."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    preset: str = _option("hapo", "Where the other fields start from: hapo, dapo or grpo")
    adaptive_temperature: bool = _option(True, "A: sample each token at its own temperature (Eq. 8)")
    token_level_advantage: bool = _option(
        True, "B: group mean and std over tokens (Eq. 9), else over completions (Eq. 1)"
    )
    redistribution: bool = _option(True, "C: amplify moving decision points, suppress settled tokens (Eq. 10-11)")
    adaptive_clip: bool = _option(True, "D: clip bounds that follow each token's entropy (Eq. 12-13)")
    tau: float = _option(0.05, "How far the temperature moves: T = base * (1 + tau * h)")
    quantile: float = _option(0.8, "rho: the share of tokens below the pivot of log-entropy")
    floor: float = _option(1e-8, "Entropies below this (nats) count as this")
    eps_low: float = _option(0.2, "How far the ratio may fall below 1 before its gradient stops")
    eps_high: float = _option(0.28, "How far the ratio may rise above 1 before its gradient stops")
    neutral_zone: Literal["base", "adapted"] = _option(
        "base", "C's zone: half the base bounds, or half the adapted ones"
    )
    dual_clip: float | None = _option(10.0, "Limit on the loss of a token with A < 0, in units of -A (null: none)")
    loss_average: Literal["token", "sequence"] = _option("token", "Mean over tokens, or over completions' own means")
    importance: Literal["none", "truncated"] = _option(
        "none", "Weight each token by min(pi_old / mu, importance_cap), mu being the sampled distribution"
    )
    importance_cap: float = _option(2.0, "Largest importance weight")

    def __post_init__(self) -> None:
        bounds = {
            "tau": 0.0 <= self.tau < 1.0,
            "quantile": 0.0 <= self.quantile <= 1.0,
            "floor": self.floor > 0.0,
            "eps_low": 0.0 < self.eps_low < 1.0,
            "eps_high": self.eps_high > 0.0,
            "dual_clip": self.dual_clip is None or self.dual_clip > 1.0,
            "importance_cap": self.importance_cap > 0.0,
        }
        for name, holds in bounds.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)} is out of range")
        if self.adaptive_clip and self.eps_low >= 0.5:
            raise ValueError("eps_low must stay below 0.5 with adaptive_clip: the lower bound reaches 1 - 2 * eps_low")

    @property
    def advantage_level(self) -> Literal["token", "sequence"]:
        return "token" if self.token_level_advantage else "sequence"


_HAPO = Method()
_DAPO = replace(
    _HAPO,
    preset="dapo",
    adaptive_temperature=False,
    token_level_advantage=False,
    redistribution=False,
    adaptive_clip=False,
)
_GRPO = replace(_DAPO, preset="grpo", eps_high=0.2, dual_clip=None, loss_average="sequence")
PRESETS: dict[str, Method] = {"hapo": _HAPO, "dapo": _DAPO, "grpo": _GRPO}


@dataclass(frozen=True)
class Credit:
    """What each token is given: advantage after redistribution, and the bounds on its ratio; all [B, T]."""

    advantage: Tensor
    lower: Tensor
    upper: Tensor


def assign_credit(method: Method, advantage: Tensor, h: Tensor, ratio: Tensor) -> Credit:
    """Pieces C and D. advantage: [B], one a completion; h, ratio: [B, T]."""
    lower, upper = clip_bounds(h if method.adaptive_clip else torch.zeros_like(h), method.eps_low, method.eps_high)
    spread = advantage[:, None].expand_as(h)
    if method.redistribution:
        zone = (method.eps_low, method.eps_high) if method.neutral_zone == "base" else (1.0 - lower, upper - 1.0)
        spread = redistribute(spread, h, ratio, *zone)
    return Credit(spread, lower, upper)


def loss_weights(mask: Tensor, average: Literal["token", "sequence"] = "token") -> Tensor:
    """Weight of each token in the loss, [B, T]. Their sum over an optimiser step is that step's denominator.

    "token": 1 each, so that long completions weigh more (DAPO). "sequence": 1 / length, so that completions weigh the
    same (GRPO).
    """
    weights = mask.to(torch.float32)
    if average == "token":
        return weights
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)


def method_loss(
    method: Method,
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    h: Tensor,
    weights: Tensor,
    denominator: Tensor | float,
    sampling_logp: Tensor | None = None,
) -> tuple[PolicyLoss, Credit]:
    """The loss of one micro-batch under `method`.

    logp, old_logp, h, sampling_logp: [B, T]. advantage: [B]. weights: [B, T] from `loss_weights`. sampling_logp is the
    log-probability under the distribution the tokens were drawn from; it is needed for `importance: truncated`.
    """
    ratio = torch.where(weights != 0, logp.detach() - old_logp, 0.0).exp()
    credit = assign_credit(method, advantage, h, ratio)
    importance = None
    if method.importance == "truncated":
        if sampling_logp is None:
            raise ValueError("importance: truncated needs the sampling log-probabilities")
        importance = (old_logp - sampling_logp).exp().clamp_max(method.importance_cap)
    loss = policy_loss(
        logp,
        old_logp,
        credit.advantage,
        weights,
        credit.lower,
        credit.upper,
        denominator,
        dual_clip=method.dual_clip,
        importance=importance,
    )
    return loss, credit
