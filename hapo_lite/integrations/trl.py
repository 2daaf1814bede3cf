"""HAPO in TRL's GRPOTrainer: the signal and pieces B, C and D, computed by `hapo_lite.algo`.

Piece A is missing, since TRL's sampler takes no temperature of each token. TRL keeps rewards, scoring and loss in
private methods, which change from version to version: this module is for TRL 1.16 alone.
Axes: B completions, T completion tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import trl
from accelerate.utils import gather, gather_object

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, loss_weights, method_loss
from hapo_lite.algo.tokens import TokenSignals, fit_signal
from hapo_lite.integrations.pieces import refuse_others

WITHOUT_A = replace(PRESETS["hapo"], adaptive_temperature=False)
AVERAGES: dict[str, Literal["token", "sequence"]] = {"dapo": "token", "grpo": "sequence"}
FIXED = {
    "beta": 0.0,
    "delta": None,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "use_liger_kernel": False,
}
"""Settings of GRPOConfig that would change the loss, and the values at which they do not."""

Inputs = dict[str, Any]
"""A batch as TRL hands it from method to method: tensors by name."""


def mask_of(inputs: Inputs) -> torch.Tensor:
    """The completion tokens that count, bool [B, T]."""
    return (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()


class HapoTrainer(trl.GRPOTrainer):
    """GRPOTrainer with HAPO's credit. GRPOConfig sets the bounds (epsilon, epsilon_high) and the mean (loss_type).

    Raises ValueError for another version of TRL and for settings that would not be obeyed.
    """

    def __init__(self, *args: Any, method: Method = WITHOUT_A, **kwargs: Any) -> None:
        if not trl.__version__.startswith("1.16."):
            raise ValueError(f"this needs trl 1.16, and {trl.__version__} is installed: pip install 'trl>=1.16,<1.17'")
        refuse_others(
            method,
            "TRL",
            "loss_type, importance_sampling_level, vllm_importance_sampling_correction and mask_truncated_completions",
        )
        if method.adaptive_temperature:
            raise ValueError("TRL opens its sampler to no temperature of each token: adaptive_temperature=False")
        super().__init__(*args, **kwargs)
        for name, value in FIXED.items():
            if getattr(self.args, name) != value:
                raise ValueError(f"{name} = {getattr(self.args, name)} would not be obeyed here: leave it at {value}")
        if self.loss_type not in AVERAGES:
            raise ValueError(f"loss_type = {self.loss_type}: use dapo (mean over tokens) or grpo (over completions)")
        if self._is_vlm:
            raise ValueError("models that read pictures are not supported here")
        self.method = replace(
            method,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            loss_average=AVERAGES[self.loss_type],
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The rewards of all processes, by reward function.
        self.rewards = super()._calculate_rewards(*args, **kwargs)
        return self.rewards

    def _generate_and_score_completions(self, inputs: Any) -> Inputs:
        out = super()._generate_and_score_completions(inputs)
        with torch.no_grad():
            _, entropy = self._score(self.model, out, batch_size=self.args.per_device_train_batch_size)
        mask = mask_of(out)
        entropy = entropy.float().clamp_min(0.0)
        signal = fit_signal(self.method, torch.cat(gather_object([entropy[mask].cpu()])))
        rewards = (self.rewards * self.reward_weights.to(self.rewards)).nansum(dim=1).double()
        size = self.num_generations if self.model.training else self.num_generations_eval
        groups = torch.arange(len(rewards), device=rewards.device) // size
        method = self.method
        advantage = group_advantage(rewards, gather(mask.sum(dim=1)), groups, method.advantage_level, method.scale)
        own = slice(self.accelerator.process_index * len(mask), (self.accelerator.process_index + 1) * len(mask))
        return out | {"advantages": advantage.float()[own], "h": signal.normalize(entropy) * mask}

    def _compute_loss(self, model: Any, inputs: Inputs) -> torch.Tensor:
        logp, _ = self._score(model, inputs)
        mask = mask_of(inputs)
        h = inputs["h"]
        weights = loss_weights(mask, self.method.loss_average) * inputs.get("importance_sampling_ratio", 1.0)
        denominator = self._denominator(inputs, len(logp))
        tokens = TokenSignals(h, torch.zeros_like(h), h > 0, h.new_ones(len(h)))
        old = inputs.get("old_per_token_logps", logp.detach())
        given = LossInputs(old, inputs["advantages"], tokens, weights)
        loss, _ = method_loss(self.method, logp, given, denominator)
        for name, value in loss.metrics.items():
            self._metrics["train" if self.model.training else "eval"][f"hapo/{name}"].append(value)
        return loss.loss

    def _denominator(self, inputs: Inputs, completions: int) -> Any:
        """The count that divides the loss of a micro-batch of so many completions, as TRL counts."""
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.method.loss_average == "sequence":
            return completions * steps
        # Optimiser steps that share a generation batch share its tokens.
        share = steps / self.args.steps_per_generation if self.model.training else 1.0
        return inputs["num_items_in_batch"].clamp_min(1) / self.accelerator.num_processes * share

    def _score(self, model: Any, inputs: Inputs, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of the completions, [B, T], at the sampling temperature."""
        ids, attention = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        length = inputs["completion_ids"].shape[1]
        found = self._get_per_token_logps_and_entropies(
            model, ids, attention, length, batch_size=batch_size, compute_entropy=True
        )
        return found[0], found[1]
