"""The clipped policy loss with a given denominator, and the advantage and bounds that a method gives each token.

Axes: B completions, T completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hapo_lite.algo.advantage import add_entropy_bonus, redistribute
from hapo_lite.algo.clipping import clip_bounds, grouped_bounds
from hapo_lite.algo.methods import Method
from hapo_lite.algo.surrogate import Credit, Gain, Moves, clipped_gain, surrogate_gain
from hapo_lite.algo.tokens import TokenSignals, trained_tokens

LossAverage = Literal["token", "sequence", "constant"]


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a micro-batch, and what it did to each token.

    loss: scalar. ratio: [B, T], detached. valid: bool [B, T], the tokens that count. clipped_low: bool [B, T], the
    tokens whose gradient the lower bound stopped. clipped_high: bool [B, T], the same for the upper bound or the dual
    clip. kl_base: [B, T], detached, the divergence from the base model in nats; None where it was not computed.
    measure: [B, T], detached, what was compared with the bounds; None if it was the ratio.
    """

    loss: Tensor
    ratio: Tensor
    valid: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl_base: Tensor | None = None
    measure: Tensor | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Means over this call's tokens: ratio, clipped fractions, and the KL divergence from the old policy, nats.

        The divergence is estimated by r - 1 - log r (Schulman, "Approximating KL divergence", 2020), which is never
        negative.
        """
        ratio = self.ratio[self.valid].double()
        if ratio.numel() == 0:
            return {"ratio": 1.0, "kl_old": 0.0, "clipped_low": 0.0, "clipped_high": 0.0}
        return {
            "ratio": float(ratio.mean()),
            # A ratio may be 0 by rounding.
            "kl_old": float((ratio - 1.0 - ratio.clamp_min(torch.finfo(torch.float32).tiny).log()).mean()),
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
    reference_logp: Tensor | None = None,
    kl_weight: Tensor | float = 0.0,
    surrogate: Callable[[Moves, Credit], Gain] | None = None,
) -> PolicyLoss:
    """DAPO's surrogate: -min(r A, clip(r, lower, upper) A), weighted by `mask` and divided by `denominator`.

    logp, old_logp, advantage, mask, lower, upper: [B, T]. `mask` may hold weights, such as 1 / length for a mean over
    sequences. `denominator` belongs to the optimiser step, not to this call: it is the sum of `mask.sum()` over all
    micro-batches of the step. The gradient then does not depend on how the step is cut. dual_clip: for A < 0 the loss
    is at most -dual_clip * A (None: no limit). importance: [B, T] weights, treated as constants.

    reference_logp: [B, T], log-probabilities of the base model. With them, each token also costs kl_weight (a number or
    [B, T]) times its divergence from the base. The estimate of the divergence is exp(x) - x - 1 with
    x = reference_logp - logp (Schulman, "Approximating KL divergence", 2020), and the gradient flows through it.

    surrogate: another gain than DAPO's, which then decides about bounds and dual_clip.
    """
    weights = mask.to(logp.dtype)
    moves = Moves.of(logp, old_logp, mask != 0)
    valid = moves.valid
    credit = Credit(advantage, lower, upper).where(valid)
    found = clipped_gain(moves.ratio, credit, dual_clip) if surrogate is None else surrogate(moves, credit)
    gain = found.value
    if importance is not None:
        gain = gain * torch.where(valid, importance.detach(), 0.0)
    kl_base = None
    if reference_logp is not None:
        to_base = torch.where(valid, reference_logp - logp, 0.0)
        kl_base = to_base.expm1() - to_base
        gain = gain - kl_weight * kl_base
        kl_base = kl_base.detach()
    loss = -(weights * gain).sum() / denominator
    ratio = moves.ratio.detach()
    low, high = found.stopped_low & valid, found.stopped_high & valid
    return PolicyLoss(loss, ratio, valid, low, high, kl_base, found.measure)


def assign_credit(method: Method, advantage: Tensor, tokens: TokenSignals, ratio: Tensor) -> Credit:
    """The final advantage of every token and its bounds.

    advantage: one per completion, [B], or one per token, [B, T]. ratio: [B, T].
    """
    lower, upper = _bounds(method, tokens)
    credit = advantage[:, None].expand_as(tokens.h) if advantage.dim() == 1 else advantage
    if method.entropy_scale:
        credit = credit * tokens.scale[:, None]
    if method.entropy_bonus > 0.0:
        credit = add_entropy_bonus(credit, tokens.entropy, method.entropy_bonus, method.entropy_bonus_limit)
    if method.redistribution and method.neutral_zone == "base":
        credit = redistribute(credit, tokens.h, ratio, method.eps_low, method.eps_high)
    elif method.redistribution:
        # By the bounds of surrogate=clip: cispo has one of them, and sapo none.
        credit = redistribute(credit, tokens.h, ratio, 1.0 - lower, upper - 1.0)
    lower, upper = _bounds_of_surrogate(method, lower, upper)
    if tokens.factor is not None:
        credit = credit * tokens.factor
    trained = trained_tokens(method, tokens.uncertain, drawn=tokens.drawn)
    return Credit(torch.where(trained, credit, 0.0), lower, upper)


def _bounds(method: Method, tokens: TokenSignals) -> tuple[Tensor, Tensor]:
    """The lower and the upper bound of every token, [B, T] each, whatever the surrogate makes of them."""
    if method.eps_uncertain is not None:
        return grouped_bounds(
            tokens.uncertain, method.eps_low, method.eps_high, method.eps_uncertain, dtype=tokens.h.dtype
        )
    h = tokens.h if method.adaptive_clip else torch.zeros_like(tokens.h)
    return clip_bounds(h, method.eps_low, method.eps_high)


def _bounds_of_surrogate(method: Method, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds that the surrogate keeps: cispo has no lower one, sapo none."""
    if method.surrogate in ("cispo", "sapo"):
        lower = torch.zeros_like(lower)
    if method.surrogate == "sapo":
        upper = torch.full_like(upper, math.inf)
    return lower, upper


def loss_weights(mask: Tensor, average: LossAverage = "token", trained: Tensor | None = None) -> Tensor:
    """The weight of each token in the loss, [B, T].

    average "token" and "constant": every token weighs 1, so a long completion weighs more (DAPO, Dr. GRPO). average
    "sequence": a token weighs 1 / length, so all completions weigh the same (GRPO). trained: bool [B, T]; if given, the
    length counts only these tokens.
    """
    weights = mask.to(torch.float32)
    if average != "sequence":
        return weights
    counted = weights if trained is None else weights * trained
    return weights / counted.sum(dim=1, keepdim=True).clamp_min(1.0)


def loss_denominator(trained_counts: Tensor, average: LossAverage = "token", limit: int | None = None) -> float:
    """The number that an optimiser step's loss is divided by. trained_counts: [B], trained tokens of each completion.

    B counts all completions of the step. average "token": the number of trained tokens. average "sequence": the number
    of completions with at least one trained token. average "constant": B times `limit`, the most tokens that a
    completion may have. The result is at least 1, so a step without a trained token has loss 0. Raises ValueError for
    "constant" without a limit.
    """
    if average == "constant":
        if limit is None:
            raise ValueError("loss_average: constant needs the limit on the tokens of a completion")
        return float(len(trained_counts) * limit)
    count = trained_counts.sum() if average == "token" else (trained_counts > 0).sum()
    return float(count.clamp_min(1))


@dataclass(frozen=True)
class LossInputs:
    """The constants of a micro-batch's loss: everything but the log-probabilities that are learned.

    old_logp: [B, T]. advantage: [B] or [B, T]. weights: [B, T] from `loss_weights`. sampling_logp: [B, T], the log-prob
    of each token under the distribution that it was drawn from; a method with importance "truncated" needs it.
    reference_logp: [B, T], the log-prob of each token under the base model; a method with a KL weight needs it.
    """

    old_logp: Tensor
    advantage: Tensor
    tokens: TokenSignals
    weights: Tensor
    sampling_logp: Tensor | None = None
    reference_logp: Tensor | None = None


def method_loss(
    method: Method, logp: Tensor, inputs: LossInputs, denominator: Tensor | float
) -> tuple[PolicyLoss, Credit]:
    """The loss of one micro-batch under `method`, and each token's credit. logp: [B, T].

    Raises ValueError if an input that the method needs is missing.
    """
    ratio = torch.where(inputs.weights != 0, logp.detach() - inputs.old_logp, 0.0).exp()
    credit = assign_credit(method, inputs.advantage, inputs.tokens, ratio)
    importance = None
    if method.importance == "truncated":
        if inputs.sampling_logp is None:
            raise ValueError("importance: truncated needs the sampling log-probabilities")
        importance = (inputs.old_logp - inputs.sampling_logp).exp().clamp_max(method.importance_cap)
    if method.needs_base and inputs.reference_logp is None:
        raise ValueError("kl_certain and kl_uncertain need the base model's log-probabilities")
    kl_weight = torch.full_like(logp, method.kl_certain).masked_fill(inputs.tokens.uncertain, method.kl_uncertain)
    # The weights and the denominator count trained tokens alone.
    trained = trained_tokens(method, inputs.tokens.uncertain, drawn=inputs.tokens.drawn)
    kl_weight = torch.where(trained, kl_weight, 0.0)
    loss = policy_loss(
        logp,
        inputs.old_logp,
        credit.advantage,
        inputs.weights,
        credit.lower,
        credit.upper,
        denominator,
        importance=importance,
        reference_logp=inputs.reference_logp if method.needs_base else None,
        kl_weight=kl_weight,
        surrogate=partial(surrogate_gain, method),
    )
    return loss, credit
