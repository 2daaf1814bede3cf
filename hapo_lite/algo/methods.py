"""Every method is a choice of the same pieces: which of them are on, their constants, and the paper of each preset.

Other code asks which pieces are on; only the recipe's advice asks for a preset's name. docs/methods.md has a row for
each preset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Method:
    """Which pieces are on, and their constants. `PRESETS` names the published combinations.

    A token is uncertain if its entropy lies above the `quantile` of the tokens that `uncertain_among` names. Any other
    token is certain.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    preset: str = _option("hapo", "Preset that gives the other fields their defaults; docs/methods.md lists the names")
    adaptive_temperature: bool = _option(True, "A: sample each token at its own temperature (Eq. 8)")
    token_level_advantage: bool = _option(
        True, "B: group mean and std over tokens (Eq. 9), else over completions (Eq. 1)"
    )
    scale: Literal["group", "batch", "none"] = _option(
        "group", "Divide advantages by the standard deviation of the group, of the iteration, or not (Dr. GRPO)"
    )
    truncated: Literal["keep", "mask"] = _option(
        "keep", "mask: a completion cut off at the limit leaves the loss and its denominator, not its group's mean"
    )
    redistribution: bool = _option(True, "C: amplify moving decision points, suppress settled tokens (Eq. 10-11)")
    adaptive_clip: bool = _option(True, "D: clip bounds that follow each token's entropy (Eq. 12-13)")
    tau: float = _option(0.05, "How far the temperature moves: T = base * (1 + tau * h)")
    quantile: float = _option(0.8, "rho: the share of tokens that are certain, at or below the pivot of log-entropy")
    floor: float = _option(1e-8, "Smallest entropy, nats: a lower one counts as this value")
    low_side: Literal["negative", "positive"] = _option(
        "negative", "Sign of h below the pivot; positive: what HAPO's public code does"
    )
    surrogate: Literal["clip", "sequence", "cispo", "sapo", "dppo"] = _option(
        "clip",
        "What the bounds hold: each token's ratio (clip), its completion's (sequence), the weight of a token (cispo), "
        "the token's probability (dppo); sapo has a soft gate instead",
    )
    eps_low: float = _option(
        0.2, "How far the ratio may fall below 1 before its gradient stops; dppo: the probability below the old one"
    )
    eps_high: float = _option(
        0.28, "How far the ratio may rise above 1 before its gradient stops; dppo: the probability above the old one"
    )
    eps_uncertain: float | None = _option(
        None, "Archer: how far an uncertain token's ratio may move, both ways (null: the same bounds for all tokens)"
    )
    neutral_zone: Literal["base", "adapted"] = _option(
        "base", "Neutral zone of C: half the distance to the base bounds, or to the adapted bounds"
    )
    dual_clip: float | None = _option(
        10.0, "Limit on the loss of a token with A < 0, in units of -A; dppo: on every token's weight (null: none)"
    )
    gate_positive: float = _option(1.0, "sapo: how fast the gradient of a token with A > 0 fades as it moves")
    gate_negative: float = _option(1.05, "sapo: the same for A < 0")
    loss_average: Literal["token", "sequence", "constant"] = _option(
        "token",
        "Mean over all tokens; mean over the completions' means; or the sum over completions x max_new_tokens "
        "(Dr. GRPO)",
    )
    trained_tokens: Literal["all", "uncertain", "random"] = _option(
        "all",
        "Tokens that have a gradient and count in the mean: uncertain (forking tokens), or as many drawn at random: "
        "the share 1 - quantile",
    )
    token_share: float = _option(
        1.0,
        "Share of the tokens that an update computes, drawn at random and weighed by its inverse: cheaper, unbiased",
    )
    uncertain_among: Literal["iteration", "completion"] = _option(
        "iteration", "The tokens whose quantile separates certain from uncertain ones"
    )
    entropy_scale: bool = _option(
        False, "EDGE-GRPO: advantage times the iteration's mean entropy over the completion's own"
    )
    entropy_bonus: float = _option(0.0, "Entropy-Adv's alpha: A + min(alpha * H, |A| / entropy_bonus_limit)")
    entropy_bonus_limit: float = _option(2.0, "Entropy-Adv's kappa: above 1, so that no advantage changes its sign")
    covariance_share: float = _option(
        0.0,
        "Clip-Cov: share of the iteration's tokens that are drawn from a band of covariance and lose their gradient",
    )
    covariance_low: float = _option(1.0, "Clip-Cov: lower end of the band of (log p - mean) (A - mean)")
    covariance_high: float = _option(5.0, "Clip-Cov: upper end of the band; below the lower one nothing is drawn")
    surprisal_factor: float = _option(
        1.0, "STARE: factor on the advantage of the least probable tokens with A > 0 (1: none)"
    )
    surprisal_share: float = _option(0.1, "STARE: their share of the tokens with A > 0")
    surprisal_below: float = _option(0.3, "STARE: mean entropy of the iteration, nats, from which on nothing is done")
    kl_certain: float = _option(0.0, "Weight of the divergence from the base model on certain tokens")
    kl_uncertain: float = _option(0.0, "Weight of the divergence from the base model on uncertain tokens")
    importance: Literal["none", "truncated"] = _option(
        "none", "Weight each token by min(pi_old / mu, importance_cap), mu being the sampled distribution"
    )
    importance_cap: float = _option(2.0, "Largest importance weight")

    def __post_init__(self) -> None:
        within = (self.eps_uncertain is None or 0.0 < self.eps_uncertain < 1.0, "above 0 and below 1, or null")
        bounds = {
            "tau": (0.0 <= self.tau < 1.0, "0 or more, and below 1"),
            "quantile": (0.0 <= self.quantile <= 1.0, "0 to 1"),
            "floor": (self.floor > 0.0, "above 0"),
            "eps_low": (0.0 < self.eps_low <= 1.0, "above 0 and at most 1"),
            "eps_high": (self.eps_high > 0.0, "above 0"),
            "eps_uncertain": within,
            "dual_clip": (self.dual_clip is None or self.dual_clip > 1.0, "above 1, or null"),
            "gate_positive": (self.gate_positive > 0.0, "above 0"),
            "gate_negative": (self.gate_negative > 0.0, "above 0"),
            "entropy_bonus": (self.entropy_bonus >= 0.0, "0 or more"),
            "entropy_bonus_limit": (self.entropy_bonus_limit > 1.0, "above 1"),
            "token_share": (0.0 < self.token_share <= 1.0, "above 0 and at most 1"),
            "covariance_share": (0.0 <= self.covariance_share <= 1.0, "0 to 1"),
            "covariance_low": (self.covariance_low >= 0.0, "0 or more"),
            "covariance_high": (self.covariance_high >= 0.0, "0 or more"),
            "surprisal_factor": (self.surprisal_factor > 0.0, "above 0"),
            "surprisal_share": (0.0 <= self.surprisal_share <= 1.0, "0 to 1"),
            "surprisal_below": (self.surprisal_below >= 0.0, "0 or more"),
            "kl_certain": (self.kl_certain >= 0.0, "0 or more"),
            "kl_uncertain": (self.kl_uncertain >= 0.0, "0 or more"),
            "importance_cap": (self.importance_cap > 0.0, "above 0"),
        }
        for name, (holds, span) in bounds.items():
            value = getattr(self, name)
            if not holds or value == math.inf:
                raise ValueError(f"{name} = {value} is out of range: it must be a number {span}")
        if self.adaptive_clip and self.low_side == "negative" and self.eps_low >= 0.5:
            raise ValueError(
                "eps_low must stay below 0.5 with adaptive_clip and low_side=negative: the lower bound reaches "
                "1 - 2 * eps_low"
            )
        if self.adaptive_clip and self.eps_uncertain is not None:
            raise ValueError(
                "adaptive_clip and eps_uncertain both set the bounds on the ratio: set adaptive_clip=false or "
                "eps_uncertain=null"
            )
        if self.token_share < 1.0 and self.surrogate == "sequence":
            raise ValueError(
                "token_share below 1 does not go with surrogate=sequence, since a completion's ratio takes all its "
                "tokens: set token_share=1 or surrogate=clip"
            )

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random before the updates."""
        return self.trained_tokens == "random" or self.token_share < 1.0 or self.covariance_share > 0.0

    @property
    def singles_out(self) -> bool:
        """Whether tokens have factors on their advantage, from `algo.selection.advantage_factor`."""
        return self.covariance_share > 0.0 or self.surprisal_factor != 1.0

    @property
    def advantage_level(self) -> Literal["token", "sequence"]:
        """The `level` of `advantage.group_advantage`."""
        return "token" if self.token_level_advantage else "sequence"

    def leaves_out(self, truncated: bool) -> bool:
        """Whether a completion that was cut off, or was not, takes no part in the loss."""
        return truncated and self.truncated == "mask"

    @property
    def needs_base(self) -> bool:
        """Whether the loss needs the base model's log-probabilities, which cost one more pass over the completions."""
        return self.kl_certain > 0.0 or self.kl_uncertain > 0.0


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
_DR_GRPO = replace(_GRPO, preset="dr_grpo", scale="none", loss_average="constant")

PRESETS: dict[str, Method] = {
    method.preset: method
    for method in (
        _GRPO,  # arXiv 2402.03300, without its KL term
        _DAPO,  # arXiv 2503.14476
        _HAPO,  # arXiv 2509.16591
        replace(_HAPO, preset="hapo_public_code", low_side="positive", neutral_zone="adapted"),
        replace(_DAPO, preset="forking_tokens", trained_tokens="uncertain"),  # arXiv 2506.01939
        replace(  # arXiv 2507.15778
            _DAPO,
            preset="archer",
            eps_high=0.2,
            eps_uncertain=0.5,
            kl_certain=0.001,
            uncertain_among="completion",
        ),
        replace(_GRPO, preset="edge_grpo", entropy_scale=True),  # arXiv 2507.21848
        replace(_GRPO, preset="entropy_adv", entropy_bonus=0.4),  # arXiv 2506.14758
        _DR_GRPO,  # arXiv 2503.20783
        replace(_GRPO, preset="gspo", surrogate="sequence", eps_low=3e-4, eps_high=4e-4),  # arXiv 2507.18071
        replace(_DAPO, preset="cispo", surrogate="cispo", eps_high=4.0, dual_clip=None),  # arXiv 2506.13585
        replace(_GRPO, preset="sapo", surrogate="sapo"),  # arXiv 2511.20347
        replace(  # arXiv 2602.04879
            _DAPO, preset="dppo", surrogate="dppo", eps_low=0.15, eps_high=0.15, dual_clip=20.0
        ),
        replace(  # arXiv 2505.22617
            _DAPO, preset="clip_cov", eps_low=1.0, eps_high=1.0, dual_clip=None, covariance_share=2e-4
        ),
        replace(_DAPO, preset="stare", surprisal_factor=1.1),  # arXiv 2606.19236
        replace(_DAPO, preset="random_tokens", trained_tokens="random"),  # arXiv 2605.07660
    )
}
