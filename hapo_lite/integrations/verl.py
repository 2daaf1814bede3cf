"""HAPO's advantage and loss as verl 0.9 calls them, computed by `hapo_lite.algo`. Only `register` imports verl.

verl gives a loss no entropies: `token_signals` sets h while a loss is computed, which `verl_cluster` does for every
micro-batch. A method without C and D needs no h.

Axes: B completions, T completion tokens. Padding may stand anywhere: a mask says which tokens count.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, loss_weights, method_loss
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import TokenSignals
from hapo_lite.integrations.pieces import refuse_others
from hapo_lite.rollout.sampling import AdaptiveTemperature

METHODS: dict[str, Method] = {}
"""The methods that `register` has registered, by their name in verl's configuration."""

SIGNAL = "hapo_signal"
"""The key of A's `signal_row` in a batch of prompts and in a request to vLLM."""

_AVERAGES: dict[str, Literal["token", "sequence"]] = {"token-mean": "token", "seq-mean-token-mean": "sequence"}
_H: ContextVar[Tensor | None] = ContextVar("h", default=None)


def register(name: str = "hapo", method: Method = PRESETS["hapo"]) -> None:
    """Make `method` known to verl under `name`: as algorithm.adv_estimator and as actor.policy_loss.loss_mode.

    Raises ValueError for a method with pieces that verl cannot run.
    """
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    refuse_others(
        method,
        "verl",
        "actor.policy_loss.loss_mode, actor.loss_agg_mode, actor.use_kl_loss and algorithm.rollout_correction",
    )
    if METHODS.get(name) == method:
        return
    register_adv_est(name)(partial(group_advantages, method))
    register_policy_loss(name)(partial(clipped_loss, method))
    METHODS[name] = method


def needs_entropy(method: Method) -> bool:
    """Whether the loss asks for h, the normalised entropy of each token."""
    return method.redistribution or method.adaptive_clip


@contextlib.contextmanager
def token_signals(h: Tensor) -> Iterator[None]:
    """A context in which `clipped_loss` takes this h for its micro-batch. h: [B, T], 0 where masked."""
    token = _H.set(h)
    try:
        yield
    finally:
        _H.reset(token)


def signal_row(method: Method, signal: EntropySignal) -> list[float]:
    """The numbers that A samples with, as a row that can accompany a prompt."""
    positive = float(signal.low_side == "positive")
    return [signal.pivot, signal.sigma, signal.high, signal.low, signal.floor, positive, method.tau]


def temperature_of(row: Sequence[float]) -> AdaptiveTemperature:
    """The adaptive temperature of Eq. 8, for logits at the base temperature. row: a `signal_row`."""
    pivot, sigma, high, low, floor, positive, tau = row
    signal = EntropySignal(pivot, sigma, high, low, floor, "positive" if positive else "negative")
    return AdaptiveTemperature(signal, tau=tau)


def group_advantages(
    method: Method, token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Hashable], **unused: Any
) -> tuple[Tensor, Tensor]:
    """The advantages of Eq. 9 or 1 over the groups that share an `index`, [B, T], 0 where masked.

    verl asks for (advantages, returns): both are this tensor. token_level_rewards, response_mask: [B, T]; the reward of
    a completion is the sum of its row. index: [B]. The computation is in fp64.
    """
    numbers: dict[Hashable, int] = {}
    groups = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in index])
    advantage = group_advantage(
        token_level_rewards.double().sum(dim=1).cpu(),
        response_mask.sum(dim=1).cpu(),
        groups,
        method.advantage_level,
        method.scale,
    )
    spread = advantage.to(token_level_rewards)[:, None] * response_mask
    return spread, spread


def clipped_loss(
    method: Method,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one micro-batch and its metrics: the same sum as in the kit's own loop. All tensors are [B, T].

    verl's actor configuration sets the bounds clip_ratio_low and clip_ratio_high, the dual clip clip_ratio_c (inf:
    none) and the mean loss_agg_mode, "token-mean" or "seq-mean-token-mean". The sum is divided by the tokens or
    completions of the whole optimiser step over all processes, which verl has counted. verl dictates the parameters.
    """
    method = _as_configured(method, config, loss_agg_mode)
    h = _H.get() if needs_entropy(method) else torch.zeros_like(log_prob)
    if h is None:
        raise RuntimeError(
            f"the loss {method.preset} needs every token's entropy: set trainer.v1.trainer_mode=hapo, and "
            "VERL_USE_EXTERNAL_MODULES=hapo_lite.integrations.verl_cluster"
        )
    mask = response_mask.bool()
    weights = loss_weights(mask, method.loss_average)
    if rollout_is_weights is not None:
        weights = weights * torch.where(mask, rollout_is_weights.detach(), 0.0)
    tokens = TokenSignals(h.to(log_prob), torch.zeros_like(log_prob), h > 0, log_prob.new_ones(len(log_prob)))
    inputs = LossInputs(old_log_prob, advantages, tokens, weights)
    loss, _ = method_loss(method, log_prob, inputs, _denominator(method, mask, config.global_batch_info))
    return loss.loss, {f"actor/{name}": value for name, value in loss.metrics.items()}


def _as_configured(method: Method, config: Any, loss_agg_mode: str) -> Method:
    """The method with the bounds and the mean of verl's configuration."""
    if loss_agg_mode not in _AVERAGES:
        raise ValueError(f"actor.loss_agg_mode = {loss_agg_mode}: use {' or '.join(_AVERAGES)}")
    return replace(
        method,
        eps_low=config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low,
        eps_high=config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high,
        dual_clip=None if math.isinf(config.clip_ratio_c) else config.clip_ratio_c,
        loss_average=_AVERAGES[loss_agg_mode],
    )


def _denominator(method: Method, mask: Tensor, step: dict[str, Any]) -> float | Tensor:
    """The count that divides the loss of a micro-batch.

    verl takes the mean of gradients over `dp_size` processes, the kit the sum, so that verl's loss is `dp_size` times
    as large.
    """
    by_token = method.loss_average == "token"
    count = step.get("batch_num_tokens" if by_token else "global_batch_size")
    if count is None:
        count = (mask.sum() if by_token else mask.any(dim=1).sum()).clamp_min(1)
    return count / step.get("dp_size", 1)
