"""Sampling through `generate` of transformers, with a decoding loop of its own.

Axes: P prompts, B rows (completions being written), V vocabulary. Each prompt is read once; its rows share that work by
copying its cache. Rows that have ended leave the batch and the cache, and what they wrote stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from hapo_lite.policy import Policy
from hapo_lite.records import Completion, EncodedPrompt
from hapo_lite.rollout.engine import Request
from hapo_lite.rollout.sampling import AdaptiveTemperature, inverse_cdf, uniforms

COMPACT_SHARE = 8
"""Finished rows are taken out once they are an eighth of the batch: copying the cache costs about one step."""


class TransformersEngine:
    """Samples with the policy's own model, so there is no second copy and never a stale adapter."""

    def __init__(self, policy: Policy, batch_size: int, max_new_tokens: int) -> None:
        self.policy, self.batch_size, self.max_new_tokens = policy, batch_size, max_new_tokens

    def sample(
        self,
        requests: Sequence[Request],
        processor: AdaptiveTemperature,
        seed: int,
        stage: int,
        iteration: int,
        limit: int | None = None,
    ) -> list[Completion]:
        """As `Engine.sample` says, batch by batch."""
        completions: list[Completion] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            limit = limit or self.max_new_tokens
            draws = [uniforms(seed, stage, iteration, r.prompt.index, r.sample, limit) for r in batch]
            completions += self._sample_batch(batch, processor, torch.stack(draws, dim=1))
        return completions

    def _sample_batch(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        """draws: [limit, B], the random numbers of each completion."""
        prompts = list({r.prompt.index: r.prompt for r in requests}.values())
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        device = self.policy.device
        ids, attention_mask = _pad_left(prompts, self.policy.tokenizer.pad_token_id, device)
        decoder = _Decoder(
            rows=torch.tensor([place[r.prompt.index] for r in requests], device=device),
            draws=draws.to(device),
            stop_ids=torch.tensor(self.policy.stop_ids, device=device),
        )
        with self.policy.sampling() as model:
            model.generate(
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
        return decoder.completions(requests, self.policy)


def _pad_left(prompts: Sequence[EncodedPrompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and attention mask, [P, L] each, padded on the left; the mask comes from lengths."""
    lengths = torch.tensor([len(p.ids) for p in prompts])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(p.ids) for p in prompts], batch_first=True, padding_value=pad_id, padding_side="left"
    )
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - lengths[:, None]
    return ids.to(device), mask.long().to(device)


class _Decoder:
    """The decoding loop that `generate` calls in place of its own.

    rows: [B], the prompt of each row; draws: [max_new, B] uniforms; stop_ids: [S]. Records are [max_new, B].
    """

    def __init__(self, rows: Tensor, draws: Tensor, stop_ids: Tensor) -> None:
        self.rows, self.draws, self.stop_ids = rows, draws, stop_ids
        self.ids = torch.zeros(draws.shape, dtype=torch.long, device=rows.device)
        self.sampling_logp, self.base_logp, self.entropy, self.temperature = torch.zeros(
            (4, *draws.shape), dtype=torch.float32, device=rows.device
        )
        self.lengths = torch.full_like(rows, draws.shape[0])
        self.stopped = torch.zeros_like(rows, dtype=torch.bool)

    def __call__(
        self, model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **kwargs
    ):
        [processor] = [p for p in logits_processor if isinstance(p, AdaptiveTemperature)]
        attention_mask, cache = kwargs["attention_mask"], kwargs["past_key_values"]
        logits = _forward(model, input_ids, attention_mask, attention_mask.cumsum(1) - 1, cache)
        cache.batch_select_indices(self.rows)
        logits, attention_mask = logits[self.rows], attention_mask[self.rows]
        position = attention_mask.sum(1, keepdim=True)
        alive = torch.arange(self.rows.shape[0], device=input_ids.device)
        for step in range(self.draws.shape[0]):
            tokens = self._choose(step, alive, logits, processor)
            running = ~self.stopped[alive]
            count = int(running.sum())
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
        return self.ids.T

    def _choose(self, step: int, alive: Tensor, logits: Tensor, processor: AdaptiveTemperature) -> Tensor:
        """Draw and record one token for every row in `alive`; rows that have ended write nothing more."""
        scores = processor(None, logits)
        tokens = inverse_cdf(scores, self.draws[step, alive])
        index = tokens[:, None]
        base_logp = logits.float().gather(1, index).squeeze(1) / processor.base - processor.log_normalizer
        sampling_logp = scores.gather(1, index).squeeze(1) - scores.logsumexp(dim=-1)
        fresh = ~self.stopped[alive]
        rows = alive[fresh]
        self.ids[step, rows] = tokens[fresh]
        self.base_logp[step, rows] = base_logp[fresh]
        self.sampling_logp[step, rows] = sampling_logp[fresh]
        self.entropy[step, rows] = processor.entropy[fresh]
        self.temperature[step, rows] = processor.temperature[fresh]
        ended = rows[torch.isin(tokens[fresh], self.stop_ids)]
        self.stopped[ended] = True
        self.lengths[ended] = step + 1
        return tokens

    def completions(self, requests: Sequence[Request], policy: Policy) -> list[Completion]:
        ids, sampling_logp, base_logp, entropy, temperature = (
            t.T.contiguous().cpu()
            for t in (self.ids, self.sampling_logp, self.base_logp, self.entropy, self.temperature)
        )
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        texts = policy.tokenizer.batch_decode(
            [ids[b, :n].tolist() for b, n in enumerate(lengths)], skip_special_tokens=True
        )
        return [
            Completion(
                prompt=request.prompt,
                sample=request.sample,
                ids=ids[b, :n].clone(),
                text=texts[b],
                truncated=not stopped[b],
                sampling_logp=sampling_logp[b, :n].clone(),
                base_logp=base_logp[b, :n].clone(),
                entropy=entropy[b, :n].clone(),
                temperature=temperature[b, :n].clone(),
            )
            for b, (request, n) in enumerate(zip(requests, lengths, strict=True))
        ]


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
