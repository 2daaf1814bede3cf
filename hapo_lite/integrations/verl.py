"""HAPO's advantage and loss in the form that verl 0.9 calls them, made of `hapo_lite.algo`. Imports verl in `register`.

verl gives a loss no entropies: `token_signals` says what h is while it runs, which `verl_cluster` does for every
micro-batch. A method without C and D needs none.

Axes: B completions, T completion tokens, padded anywhere: a mask says which count.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

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
"""What `register` has registered, by the name that verl's configuration gives."""

SIGNAL = "hapo_signal"
"""Where a batch of prompts, and a request to vLLM, has the signal that A samples with: a `signal_row`."""

_AVERAGES = {"token-mean": "token", "seq-mean-token-mean": "sequence"}
_H: ContextVar[Tensor | None] = ContextVar("h", default=None)


def register(name: str = "hapo", method: Method = PRESETS["hapo"]) -> None:
    """Make `method` known to verl under `name`: as algorithm.adv_estimator and as actor.policy_loss.loss_mode.

    Raises ValueError for a method with pieces that have no place there.
    """
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    refuse_others(method, "verl", "actor.use_kl_loss and algorithm.rollout_correction")
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
    """Within, `clipped_loss` takes h, [B, T], for its micro-batch; 0 where masked."""
    token = _H.set(h)
    try:
        yield
    finally:
        _H.reset(token)


def signal_row(method: Method, signal: EntropySignal) -> list[float]:
    """A's numbers, to travel with a prompt."""
    positive = float(signal.low_side == "positive")
    return [signal.pivot, signal.sigma, signal.high, signal.low, signal.floor, positive, method.tau]


def temperature_of(row: Sequence[float]) -> AdaptiveTemperature:
    """Eq. 8 for logits at the base temperature. row: a `signal_row`."""
    *numbers, positive, tau = row
    return AdaptiveTemperature(EntropySignal(*numbers, "positive" if positive else "negative"), tau=tau)


def group_advantages(
    method: Method, token_level_rewards: Tensor, response_mask: Tensor, index: Sequence, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Eq. 9 or 1 over the groups that share an `index`: (advantages, returns), the same [B, T], 0 where masked.

    token_level_rewards, response_mask: [B, T]; a completion's reward is the sum of its row. index: [B], any hashables.
    Computed in fp64.
    """
    numbers: dict = {}
    groups = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in index])
    advantage = group_advantage(
        token_level_rewards.double().sum(dim=1).cpu(), response_mask.sum(dim=1).cpu(), groups, method.advantage_level
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
    """The loss of one micro-batch, [B, T] each, and its metrics: the same sum as the kit's own loop makes.

    verl's actor configuration decides what it has a name for: clip_ratio_low, clip_ratio_high, clip_ratio_c (inf: no
    dual clip) and loss_agg_mode, "token-mean" or "seq-mean-token-mean". Divided by what belongs to the whole optimiser
    step, which verl has counted, over all processes.
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
    if loss_agg_mode not in _AVERAGES:
        raise ValueError(f"actor.loss_agg_mode = {loss_agg_mode}: use {' or '.join(_AVERAGES)}")
    low, high = (
        config.clip_ratio if value is None else value for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    return replace(
        method,
        eps_low=low,
        eps_high=high,
        dual_clip=None if math.isinf(config.clip_ratio_c) else config.clip_ratio_c,
        loss_average=_AVERAGES[loss_agg_mode],
    )


def _denominator(method: Method, mask: Tensor, step: dict[str, Any]) -> float | Tensor:
    """Over `dp_size` processes verl takes the mean of gradients, the kit the sum: verl's loss is that much larger."""
    by_token = method.loss_average == "token"
    count = step.get("batch_num_tokens" if by_token else "global_batch_size")
    if count is None:
        count = (mask.sum() if by_token else mask.any(dim=1).sum()).clamp_min(1)
    return count / step.get("dp_size", 1)
