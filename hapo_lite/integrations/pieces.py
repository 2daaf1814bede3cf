"""The pieces of a method that the trainers of other projects can run."""

from __future__ import annotations

from hapo_lite.algo.methods import Method


def refuse_others(method: Method, trainer: str, own: str) -> None:
    """Raise ValueError if `method` has more pieces than A-D and DAPO's. own: settings that `trainer` has instead."""
    lacking = {
        f"surrogate: {method.surrogate}": method.surrogate != "clip",
        "loss_average: constant": method.loss_average == "constant",
        "trained_tokens": method.trained_tokens != "all",
        "token_share": method.token_share < 1.0,
        "covariance_share": method.covariance_share > 0.0,
        "surprisal_factor": method.surprisal_factor != 1.0,
        "eps_uncertain": method.eps_uncertain is not None,
        "entropy_scale": method.entropy_scale,
        "entropy_bonus": method.entropy_bonus > 0.0,
        "kl_certain and kl_uncertain": method.needs_base,
        "importance": method.importance != "none",
        "truncated": method.truncated != "keep",
    }
    for piece, wanted in lacking.items():
        if wanted:
            raise ValueError(f"{method.preset}: {trainer} has no place for {piece} here; its own are {own}")
