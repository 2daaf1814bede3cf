"""Sampling through `generate` of transformers, with a decoding loop of our own in place of the library's.

Axes: P prompts, L tokens of a padded prompt, B rows (completions being written), V vocabulary. Each prompt is read
once, and its cache is copied for each of its rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

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
from hapo_lite.rollout.draws import DrawKey, draws_of
from hapo_lite.rollout.engine import EngineSettings
from hapo_lite.rollout.forward import FixedForward, Forward, GrowingForward, read_prompts
from hapo_lite.rollout.graphs import recorder_for
from hapo_lite.rollout.sampling import AdaptiveTemperature, Drawn
from hapo_lite.rollout.transcript import pad_left

PREPARING = 10
"""A batch is written at least so many times as long between two looks as it takes to prepare the model for writing."""


@dataclass(frozen=True)
class Watch:
    """How a batch is looked at while it is written.

    limit: the longest completion, tokens; None: the engine's own. seconds: about the time between two looks. drew: as
    in `Writing`.
    """

    limit: int | None = None
    seconds: float = 0.25
    drew: Callable[[Tensor, Drawn], None] = lambda logits, drawn: None


class Ends(NamedTuple):
    """lengths: [B], the tokens of each completion so far, without what was written after its stop token.

    stopped: [B], whether the last one is a stop token.
    """

    lengths: list[int]
    stopped: list[bool]


class Batch:
    """Completions that are being written together. whole: whether all have ended, or have reached the limit."""

    def __init__(self, policy: Policy, requests: Sequence[Request], decoder: Decoder, forward: Forward) -> None:
        self.policy, self.requests = policy, requests
        self.transcript, self.stop_ids = decoder.transcript, decoder.writing.stop_ids
        self.whole = False
        self._written = 0
        self._forward = forward
        self._steps = decoder.steps(forward)

    def write(self, seconds: float = math.inf) -> None:
        """Write on until the batch is whole, or that time is over. The model is in the state in which it writes."""
        due = time.monotonic() + seconds
        with self._forward.reading():
            for written in self._steps:
                self._written = written
                if time.monotonic() >= due:
                    return
        self.whole = True
        self._written = self.transcript.ids.shape[0]

    def ends(self) -> Ends:
        """Where each completion ends, as far as they are written."""
        stops = torch.isin(self.transcript.ids[: self._written], self.stop_ids)
        stopped = stops.any(dim=0)
        lengths = torch.where(stopped, stops.int().argmax(dim=0) + 1, self._written)
        return Ends(lengths.tolist(), stopped.tolist())

    def ids(self, row: int, length: int) -> list[int]:
        """The first tokens of one completion."""
        return self.transcript.ids[:length, row].tolist()

    def completions(self) -> list[Completion]:
        """The completion of each request, of a batch that is whole."""
        return self.transcript.completions(self.requests, *self.ends(), self.policy)


class TransformersEngine(BatchedEngine):
    """Samples with the policy's own model, so the weights exist once and the adapter is never out of date.

    fixed: whether the cache is allocated once for a batch. None: not known before the first prompts have been read.
    cuda_graphs: as `recorder_for` has it.
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
        record = recorder_for(self.cuda_graphs, self.policy.device)
        with self._decoding() as model:
            batch = self._begin(
                model, requests, self._writing_of(processor, draws, wrote=self.writing.wrote, record=record)
            )
            batch.write()
        return batch.completions()

    def stream(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, key: DrawKey, watch: Watch
    ) -> Iterator[Batch]:
        """The completions of `sample`, as one batch that is shown while it is written, and when it is whole.

        The model is in the sampler's state only while tokens are written: whoever looks at the batch may use the model.
        """
        draws = put(draws_of(requests, key, watch.limit or self.max_new_tokens), self.policy.device)
        batch = None
        with self._ready():
            while batch is None or not batch.whole:
                before = time.monotonic()
                with self._decoding() as model:
                    # A large model's layers are many to prepare, so it writes for longer.
                    seconds = max(watch.seconds, PREPARING * (time.monotonic() - before))
                    if batch is None:
                        with self._first_run():
                            batch = self._begin(model, requests, self._writing_of(processor, draws, drew=watch.drew))
                    batch.write(seconds)
                yield batch

    @contextmanager
    def _decoding(self) -> Iterator[PreTrainedModel]:
        """A context with the model in the state in which it reads and writes."""
        with self.policy.sampling() as model, held_factors(self.policy.model, self.policy.dtype):
            yield model

    def _writing_of(self, processor: AdaptiveTemperature, draws: Tensor, **hooks: Any) -> Writing:
        stop_ids = put(torch.tensor(self.policy.stop_ids), self.policy.device)
        return Writing(processor, draws, stop_ids, **hooks)

    def _begin(self, model: PreTrainedModel, requests: Sequence[Request], writing: Writing) -> Batch:
        """Read the prompts, and write the first token of every completion."""
        prompts = list({r.prompt.index: r.prompt for r in requests}.values())
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        policy, device = self.policy, self.policy.device
        ids, attention_mask = pad_left(prompts, policy.tokenizer.pad_token_id, device)
        rows = put(torch.tensor([place[r.prompt.index] for r in requests]), device)
        limit = writing.draws.shape[0]
        decoder = Decoder(writing, attention_mask.sum(1, keepdim=True)[rows] - 1)

        def read(model, input_ids: Tensor, *_, **prepared) -> Batch:
            cache = self._empty_cache(model, prepared)
            logits = read_prompts(model, input_ids, attention_mask, cache)
            forward = self._forward(model, cache, rows, attention_mask, limit)
            decoder.choose(len(requests), logits[rows])
            return Batch(policy, requests, decoder, forward)

        generation = {
            "input_ids": ids,
            "attention_mask": attention_mask,
            "generation_config": GenerationConfig(
                max_new_tokens=limit,
                do_sample=True,
                pad_token_id=policy.tokenizer.pad_token_id,
                eos_token_id=list(policy.stop_ids),
            ),
            "logits_processor": LogitsProcessorList([writing.processor]),
            "custom_generate": read,
        }
        # transformers declares `generate` in a mixin.
        try:
            return model.generate(**generation)  # type: ignore[operator]
        except NotCovered:
            self.fixed = False
            return model.generate(**generation)  # type: ignore[operator]

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
