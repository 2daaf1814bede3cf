"""HAPO on verl's Ray cluster: name this module in VERL_USE_EXTERNAL_MODULES (recipes/verl/hapo_qwen7b.sh).

verl 0.9 gives its advantages and losses no entropies, though its pass with the old policy computes them. Its extension
points carry them: a trainer (trainer.v1.trainer_mode=hapo) computes h over the whole iteration, and a loss takes h
beside verl's own tensors. For A, an agent loop (rollout.agent.default_agent_loop=hapo) sends the previous iteration's
signal to vLLM, where `verl_rollout` reads it. `make verl-smoke` runs this module over a local Ray, on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transfer_queue
from verl.experimental.agent_loop.agent_loop import register as register_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import fit_signal
from hapo_lite.integrations import verl

for _name in ("hapo", "hapo_public_code"):
    verl.register(_name, PRESETS[_name])


def ppo_loss_with_h(
    config: Any, model_output: Any, data: Any, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's loss of a micro-batch, computed while `token_signals` holds the `hapo_h` of its tokens."""
    with verl.token_signals(torch.nested.to_padded_tensor(data["hapo_h"], 0.0)):
        return ppo_loss(config, model_output, data, dp_group)


@register_trainer("hapo")
class HapoTrainer(PPOTrainerSync):
    """verl's synchronous trainer, with h for the loss and the previous iteration's signal for sampling.

    The first iteration, and the first after a resume, samples at the base temperature.
    """

    def __init__(self, config: Any) -> None:
        loss = config.actor_rollout_ref.actor.policy_loss.loss_mode
        estimator = config.algorithm.adv_estimator
        if loss not in verl.METHODS or estimator not in verl.METHODS:
            raise ValueError(
                f"trainer_mode=hapo needs algorithm.adv_estimator and actor.policy_loss.loss_mode among "
                f"{', '.join(verl.METHODS)}; they are {estimator} and {loss}"
            )
        if (config.algorithm.get("rollout_correction") or {}).get("bypass_mode"):
            raise ValueError(
                "rollout_correction.bypass_mode leaves out the pass that finds the entropies: switch it off"
            )
        self.method = verl.METHODS[loss]
        self.signal: EntropySignal | None = None
        config.trainer.v1.trainer_mode = "sync"  # The base class asks for this name wherever it is not asynchronous.
        super().__init__(config)

    def on_init_end(self) -> None:
        super().on_init_end()
        if verl.needs_entropy(self.method):
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(ppo_loss_with_h, config=actor))

    def _next_train_batch(self, num_prompts: int | None = None) -> Any:
        batch = super()._next_train_batch(num_prompts)
        if self.method.adaptive_temperature and self.signal is not None:
            row = verl.signal_row(self.method, self.signal)
            batch[verl.SIGNAL] = torch.tensor([row] * len(batch), dtype=torch.float64)
        return batch

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_old_log_prob(batch, metrics)
        found = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["entropy", "response_mask"]
        )
        real = [not tag.get("is_padding", False) for tag in batch.tags]
        h, signal = signals(self.method, found["entropy"], found["response_mask"], real)
        self.signal = signal
        transfer_queue.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=found.empty().update({"hapo_h": h})
        )
        metrics["hapo/pivot"] = signal.pivot
        metrics["hapo/sigma"] = signal.sigma
        return batch


def signals(method: Method, entropy: torch.Tensor, mask: torch.Tensor, real: list[bool]) -> tuple[Any, EntropySignal]:
    """h of every token, nested like `entropy`, and the signal over the tokens that count.

    entropy, mask: nested [B, T_i]. real: false for the rows that only fill the batch. verl computes an entropy as the
    difference of two large numbers, which rounding may leave below 0: such an entropy counts as 0.
    """
    rows = [row.float().clamp_min(0.0) for row in entropy.unbind()]
    counted = [row[keep.bool()] for row, keep, wanted in zip(rows, mask.unbind(), real, strict=True) if wanted]
    signal = fit_signal(method, torch.cat(counted))
    return torch.nested.as_nested_tensor([signal.normalize(row) for row in rows], layout=torch.jagged), signal


@register_agent_loop("hapo")
class HapoAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn agent loop, whose requests carry the signal that the trainer added to the prompt."""

    async def run(self, sampling_params: dict[str, Any], hapo_signal: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if hapo_signal is not None:
            sampling_params = {**sampling_params, "extra_args": {verl.SIGNAL: hapo_signal.tolist()}}
        return await super().run(sampling_params, **kwargs)
