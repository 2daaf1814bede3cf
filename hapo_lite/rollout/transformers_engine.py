"""Sampling through `generate` of transformers, with a decoding loop of this module in place of the library's.

Axes: P prompts, L tokens of a padded prompt, B rows (completions being written), V vocabulary. Each prompt is read
once, and its cache is copied for each of its rows. Rows that have ended leave the batch and the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from hapo_lite.records import Completion, Request
from hapo_lite.rollout.batched_engine import BatchedEngine
from hapo_lite.rollout.sampling import AdaptiveTemperature, draw
from hapo_lite.rollout.transcript import Transcript, pad_left

COMPACT_SHARE = 8
"""Finished rows are removed once they are an eighth of the batch, because copying the cache costs about one step."""


class TransformersEngine(BatchedEngine):
    """Samples with the policy's own model, so the weights exist once and the adapter is never out of date."""

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        prompts = list({r.prompt.index: r.prompt for r in requests}.values())
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        device = self.policy.device
        ids, attention_mask = pad_left(prompts, self.policy.tokenizer.pad_token_id, device)
        decoder = _Decoder(
            attention_mask=attention_mask,
            rows=torch.tensor([place[r.prompt.index] for r in requests], device=device),
            draws=draws,
            stop_ids=torch.tensor(self.policy.stop_ids, device=device),
            wrote=self.writing.wrote,
        )
        with self.policy.sampling() as model:
            model.generate(  # type: ignore[operator]  # transformers declares it in a mixin
                input_ids=ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(
                    max_new_tokens=draws.shape[0],
                    do_sample=True,
                    pad_token_id=self.policy.tokenizer.pad_token_id,
                    eos_token_id=list(self.policy.stop_ids),
                ),
                logits_processor=LogitsProcessorList([processor]),
                custom_generate=decoder,
            )
        lengths, stopped = decoder.lengths.tolist(), decoder.stopped.tolist()
        return decoder.transcript.completions(requests, lengths, stopped, self.policy)


class _Decoder:
    """The decoding loop that `generate` calls in place of its own.

    attention_mask: [P, L]; rows: [B], the prompt of each row; draws: [limit, B], the random numbers; stop_ids: every
    token that ends a completion; wrote: called after each step with the number of rows that go on.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        rows: Tensor,
        draws: Tensor,
        stop_ids: Tensor,
        wrote: Callable[[int], None] = lambda running: None,
    ) -> None:
        self.wrote = wrote
        # `generate` of transformers 5.19 drops a mask that hides nothing.
        self.attention_mask = attention_mask
        self.rows, self.draws, self.stop_ids = rows, draws, stop_ids
        limit, count = draws.shape
        self.transcript = Transcript(limit, count, rows.device)
        self.lengths = torch.full_like(rows, draws.shape[0])
        self.stopped = torch.zeros_like(rows, dtype=torch.bool)

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **kwargs
    ):
        [processor] = [p for p in logits_processor if isinstance(p, AdaptiveTemperature)]
        attention_mask, cache = self.attention_mask, kwargs["past_key_values"]
        logits = _forward(model, input_ids, attention_mask, attention_mask.cumsum(1) - 1, cache)
        cache.batch_select_indices(self.rows)
        logits, attention_mask = logits[self.rows], attention_mask[self.rows]
        position = attention_mask.sum(1, keepdim=True)
        alive = torch.arange(self.rows.shape[0], device=input_ids.device)
        for step in range(self.draws.shape[0]):
            tokens = self._choose(step, alive, logits, processor)
            running = ~self.stopped[alive]
            count = int(running.sum())
            self.wrote(count)
            if count == 0:
                break
            if (alive.shape[0] - count) * COMPACT_SHARE >= alive.shape[0]:
                keep = running.nonzero().squeeze(1)
                alive, tokens = alive[keep], tokens[keep]
                attention_mask, position = attention_mask[keep], position[keep]
                cache.batch_select_indices(keep)
            if step + 1 < self.draws.shape[0]:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(alive.shape[0], 1)], dim=1)
                logits = _forward(model, tokens[:, None], attention_mask, position, cache)
                position = position + 1
        return self.transcript.ids.T

    def _choose(self, step: int, alive: Tensor, logits: Tensor, processor: AdaptiveTemperature) -> Tensor:
        """Draw one token for every row in `alive`, and record those of the rows that have not ended."""
        drawn = draw(processor, logits, self.draws[step, alive])
        fresh = ~self.stopped[alive]
        rows = alive[fresh]
        self.transcript.write(step, rows, drawn, only=fresh)
        ended = rows[torch.isin(drawn.ids[fresh], self.stop_ids)]
        self.stopped[ended] = True
        self.lengths[ended] = step + 1
        return drawn.ids


def _forward(model, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache) -> Tensor:
    """Next-token logits [B, V]."""
    return model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids[:, -ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
