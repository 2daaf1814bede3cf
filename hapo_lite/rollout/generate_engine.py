"""Sampling through a model's own `generate`: the way to Unsloth's fast one, and a baseline for speed.

Axes: B rows (completions being written), T tokens, V vocabulary. Every row reads its own prompt, and a row that has
ended stays in the batch until the last row has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hapo_lite.records import Completion, Request, put
from hapo_lite.rollout.batched_engine import BatchedEngine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import ForcedSampler, pad_left


class GenerateEngine(BatchedEngine):
    """Samples with the policy's own model. A logits processor draws each token, and `generate` takes that token."""

    def generator(self, model: PreTrainedModel) -> Callable[..., Tensor]:
        """The function that generates, called with the arguments of `generate` of transformers."""
        return model.generate  # type: ignore[return-value]  # transformers declares it in a mixin

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        policy, forced = self.policy, ForcedSampler(processor, draws, self.writing.drew)
        ids, attention_mask = pad_left([r.prompt for r in requests], policy.tokenizer.pad_token_id, policy.device)
        with policy.sampling() as model:
            generate = self.generator(model)
            written = generate(
                input_ids=ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(
                    max_new_tokens=draws.shape[0],
                    do_sample=False,  # greedy: the processor has drawn, and leaves one token
                    pad_token_id=policy.tokenizer.pad_token_id,
                    eos_token_id=list(policy.stop_ids),
                ),
                logits_processor=LogitsProcessorList([_WithSteps(forced, ids.shape[1])]),
            )[:, ids.shape[1] :]
        return forced.completions(requests, until_stop(written, policy.stop_ids), policy)


class _WithSteps(LogitsProcessor):
    """A `ForcedSampler` as a logits processor, which knows the step by the length of what has been written.

    width: length of the padded prompts, tokens.
    """

    def __init__(self, forced: ForcedSampler, width: int) -> None:
        self.forced, self.width = forced, width

    # transformers asks for FloatTensor, a type that no tensor has.
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(scores.shape[0], device=scores.device)
        return self.forced(scores, torch.full_like(rows, input_ids.shape[1] - self.width), rows)


def until_stop(written: Tensor, stop_ids: Sequence[int]) -> list[list[int]]:
    """Each row of `written`, [B, T], up to and with its first stop token; the rest of the row is padding."""
    stops = torch.isin(written, put(torch.tensor(stop_ids), written.device))
    ended = stops.any(dim=1)
    lengths = torch.where(ended, stops.int().argmax(dim=1) + 1, written.shape[1])
    return [row[:n] for row, n in zip(written.tolist(), lengths.tolist(), strict=True)]
