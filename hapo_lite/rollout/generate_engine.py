"""Sampling through plain `generate`, whatever its loop: how Unsloth's fast one is called, and a measure of speed.

Axes: B rows (completions being written), V vocabulary. Every row reads its prompt for itself, and rows that have ended
stay in the batch until the last one has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hapo_lite.records import Completion
from hapo_lite.rollout.batched_engine import BatchedEngine
from hapo_lite.rollout.engine import Request
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import Scribe, pad_left


class GenerateEngine(BatchedEngine):
    """Samples with the policy's own model. A logits processor draws each token, and `generate` takes its choice."""

    def generator(self, model: PreTrainedModel) -> Callable[..., Tensor]:
        """What is called to generate."""
        return model.generate

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        policy, scribe = self.policy, Scribe(processor, draws, self.writing.drew)
        ids, attention_mask = pad_left([r.prompt for r in requests], policy.tokenizer.pad_token_id, policy.device)
        with policy.sampling() as model:
            written = self.generator(
                model
            )(
                input_ids=ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(
                    max_new_tokens=draws.shape[0],
                    do_sample=False,  # the scribe has drawn; what is left is to take its choice
                    pad_token_id=policy.tokenizer.pad_token_id,
                    eos_token_id=list(policy.stop_ids),
                ),
                logits_processor=LogitsProcessorList([_Dictating(scribe, ids.shape[1])]),
            )[:, ids.shape[1] :]
        return scribe.completions(requests, until_stop(written, policy.stop_ids), policy)


class _Dictating(LogitsProcessor):
    """Tells the scribe which step it is; the rows are always the batch's. width: of the padded prompts."""

    def __init__(self, scribe: Scribe, width: int) -> None:
        self.scribe, self.width = scribe, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(scores.shape[0], device=scores.device)
        return self.scribe(scores, torch.full_like(rows, input_ids.shape[1] - self.width), rows)


def until_stop(written: Tensor, stop_ids: Sequence[int]) -> list[list[int]]:
    """Each row of [B, T] up to its first stop token, that one included: what follows is padding."""
    stops = torch.isin(written, torch.tensor(stop_ids, device=written.device))
    ended = stops.any(dim=1)
    lengths = torch.where(ended, stops.int().argmax(dim=1) + 1, written.shape[1])
    return [row[:n] for row, n in zip(written.tolist(), lengths.tolist(), strict=True)]
