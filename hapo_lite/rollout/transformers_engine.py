"""Sampling through `generate` of transformers, with a decoding loop of our own in place of the library's.

Axes: P prompts, L tokens of a padded prompt, B rows (completions being written), V vocabulary. Each prompt is read
once, and its cache is copied for each of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel

from hapo_lite.errors import UserError
from hapo_lite.model.decoder import cache_name
from hapo_lite.model.lora import held_factors
from hapo_lite.model.policy import Policy
from hapo_lite.model.refusals import no_cache
from hapo_lite.records import Completion, Request, put
from hapo_lite.rollout.attention import NotCovered, covers
from hapo_lite.rollout.batched_engine import BatchedEngine
from hapo_lite.rollout.cache import FixedCache
from hapo_lite.rollout.decoding import Decoder, Writing
from hapo_lite.rollout.engine import EngineSettings
from hapo_lite.rollout.forward import FixedForward, Forward, GrowingForward, read_prompts
from hapo_lite.rollout.graphs import recorder_for
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import pad_left


class TransformersEngine(BatchedEngine):
    """Samples with the policy's own model, so the weights exist once and the adapter is never out of date.

    fixed: whether the cache is allocated once for a batch. None: not known before the first prompts have been read.
    cuda_graphs: rollout.cuda_graphs.
    """

    def __init__(self, policy: Policy, batch_size: int, max_new_tokens: int, cuda_graphs: str = "off") -> None:
        super().__init__(policy, batch_size, max_new_tokens)
        self.fixed: bool | None = None
        self.cuda_graphs = cuda_graphs

    @classmethod
    def make(cls, settings: EngineSettings, policy: Policy) -> Self:
        rollout = settings.rollout
        return cls(policy, rollout.batch_size, settings.max_new_tokens, rollout.cuda_graphs)

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        prompts = list({r.prompt.index: r.prompt for r in requests}.values())
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        policy, device = self.policy, self.policy.device
        ids, attention_mask = pad_left(prompts, policy.tokenizer.pad_token_id, device)
        rows = put(torch.tensor([place[r.prompt.index] for r in requests]), device)
        stop_ids = put(torch.tensor(policy.stop_ids), device)
        record = recorder_for(self.cuda_graphs, device)
        decoder = Decoder(
            Writing(processor, draws, stop_ids, self.writing.wrote, record),
            attention_mask.sum(1, keepdim=True)[rows] - 1,
        )

        def decode(model, input_ids: Tensor, *_, **prepared) -> Tensor:
            cache = self._empty_cache(model, prepared)
            logits = read_prompts(model, input_ids, attention_mask, cache)
            decoder.run(self._forward(model, cache, rows, attention_mask, draws.shape[0]), logits[rows])
            return decoder.transcript.ids.T

        with policy.sampling() as model, held_factors(policy.model, policy.dtype):
            generation = {
                "input_ids": ids,
                "attention_mask": attention_mask,
                "generation_config": GenerationConfig(
                    max_new_tokens=draws.shape[0],
                    do_sample=True,
                    pad_token_id=policy.tokenizer.pad_token_id,
                    eos_token_id=list(policy.stop_ids),
                ),
                "logits_processor": LogitsProcessorList([processor]),
                "custom_generate": decode,
            }
            # transformers declares `generate` in a mixin.
            try:
                model.generate(**generation)  # type: ignore[operator]
            except NotCovered:
                self.fixed = False
                model.generate(**generation)  # type: ignore[operator]
        stops = torch.isin(decoder.transcript.ids, stop_ids)
        stopped = stops.any(dim=0)
        lengths = torch.where(stopped, stops.int().argmax(dim=0) + 1, draws.shape[0])
        return decoder.transcript.completions(requests, lengths.tolist(), stopped.tolist(), policy)

    def _empty_cache(self, model: PreTrainedModel, prepared: Mapping[str, Any]) -> Cache:
        """The cache that transformers has made for the model. prepared: the arguments that `generate` made.

        Raises UserError if the model takes none, or one of a kind of its own.
        """
        cache = prepared.get(cache_name(model) or "")
        if not isinstance(cache, Cache):
            raise UserError(no_cache(str(model.name_or_path), model))
        return cache

    def _forward(
        self, model: PreTrainedModel, cache: Cache, rows: Tensor, attention_mask: Tensor, limit: int
    ) -> Forward:
        """The model with the prompts' cache spread over the rows. Raises NotCovered before anything is written."""
        if self.fixed is False or not covers(model, cache):
            return GrowingForward(model, cache, rows, attention_mask)
        # The last token of a completion is not read.
        fixed = FixedForward(model, FixedCache(cache, rows, attention_mask, attention_mask.shape[1] + limit - 1))
        if self.fixed is None:
            fixed.check()
            self.fixed = True
        return fixed
