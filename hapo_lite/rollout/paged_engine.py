"""Sampling through the continuous batching of transformers: a paged cache, and a new row as soon as one has ended.

A logits processor draws each token from random numbers that are fixed in advance, and leaves the library no other token
to choose, so a completion depends on neither batch nor schedule. Axes: B requests, n rows of a step, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from hapo_lite.errors import UserError
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.records import Completion, Request
from hapo_lite.rollout.batched_engine import WAVE, BatchedEngine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import ForcedSampler

BLOCK_TOKENS, FLASH_BLOCK_TOKENS = 32, 256
"""Tokens in a block of the cache; flash attention reads pages of 256."""
READ_TOKENS = 256
"""Most prompt tokens that are read in one step, beside the tokens being written."""
MEMORY_SHARE = 0.9
"""Largest share of the free memory for the cache."""


class PagedEngine(BatchedEngine):
    """Samples with the policy's own model, as `TransformersEngine` does."""

    @property
    def part_size(self) -> int:
        return WAVE * self.batch_size

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        limit = draws.shape[0]
        forced = ForcedSampler(processor, draws, self.writing.drew)
        sampler = _PagedSampler(forced, [len(r.prompt.ids) for r in requests])
        with self.policy.sampling(), _paged(self.policy.base, sampler) as base:
            written = _generate(
                base,
                [list(r.prompt.ids) for r in requests],
                GenerationConfig(
                    max_new_tokens=limit,
                    do_sample=False,  # greedy: the processor has drawn, and leaves one token
                    pad_token_id=self.policy.tokenizer.pad_token_id,
                    eos_token_id=list(self.policy.stop_ids),
                ),
                self._cache(requests, limit, base.config._attn_implementation),
                self.writing.finished,
            )
        return forced.completions(requests, written, self.policy)

    def _cache(self, requests: Sequence[Request], limit: int, attention: str) -> ContinuousBatchingConfig:
        """A cache with room for a whole batch of the longest completions, so that none is evicted.

        attention: the name of the model's attention implementation.
        """
        rows = min(self.batch_size, len(requests))
        block = FLASH_BLOCK_TOKENS if "flash" in attention else BLOCK_TOKENS
        longest = max(len(r.prompt.ids) for r in requests) + limit
        return ContinuousBatchingConfig(
            block_size=block,
            num_blocks=rows * (math.ceil(longest / block) + 1),  # a row may be given its next block early
            max_batch_tokens=rows + READ_TOKENS,
            max_requests_per_batch=rows,
            max_memory_percent=MEMORY_SHARE,
            safety_margin=0.0,
            per_request_processors=True,
            use_async_batching=False,  # a row's step must be known when its token is drawn
            use_cuda_graph=False,
        )


class _PagedSampler(ContinuousBatchingLogitsProcessor):
    """A `ForcedSampler` as a logits processor of continuous batching.

    For each row the library carries one integer to the device: step * B + request. prompt_lengths: [B], tokens.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012, the base class's declaration
    ignored_kwargs = ()

    def __init__(self, forced: ForcedSampler, prompt_lengths: Sequence[int]) -> None:
        self.forced, self.prompt_lengths = forced, prompt_lengths
        self.drawing = 0  # rows of the current step that get a token

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list) -> Tensor:
        places = []
        for state in (r.state for r in requests_with_new_token):
            request = int(state.request_id)
            # A request that was evicted starts again, with the tokens it has written as a part of its prompt.
            step = len(state.initial_tokens) + len(state.generated_tokens) - self.prompt_lengths[request]
            places.append(step * len(self.prompt_lengths) + request)
        self.drawing = len(places)
        return torch.tensor(places, dtype=torch.int32)

    # transformers asks for FloatTensor, a type that no tensor has.
    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # type: ignore[override]
        # After the rows that get a token come rows of prompts that are read in part, whose integers are out of date.
        places = tensor_arg[: self.drawing].long()
        requests = len(self.prompt_lengths)
        scores[: self.drawing] = self.forced(scores[: self.drawing], places // requests, places % requests)
        return scores


# The library tells only the processors of this table which request a row belongs to. The table's type is inferred from
# its classes and refuses the functions that the library calls all the same.
CLASSIC_TO_CB_PROCESSORS_MAP[_PagedSampler] = lambda sampler: sampler  # type: ignore[assignment]


@contextlib.contextmanager
def _paged(base: PreTrainedModel, sampler: _PagedSampler) -> Iterator[PreTrainedModel]:
    """A context within which the model has paged attention, and `sampler` as its only logits processor.

    Continuous batching takes no `logits_processor`. It asks the model for a list made from the generation settings.
    """
    attention = base.config._attn_implementation
    # transformers declares the method in a mixin.
    base._get_logits_processor = lambda *_, **__: LogitsProcessorList([sampler])  # type: ignore[assignment]
    try:
        base.set_attn_implementation(f"paged|{attention}")
        yield base
    finally:
        del base._get_logits_processor
        base.set_attn_implementation(attention)


def _generate(
    base: PreTrainedModel,
    prompts: list[list[int]],
    generation: GenerationConfig,
    cache: ContinuousBatchingConfig,
    finished: Callable[[], None],
) -> list[list[int]]:
    """The token ids written after each prompt. finished: called whenever a completion ends.

    `generate_batch` of the library is not used, because it swallows the exception that a signal raises. Raises
    OutOfMemoryError where memory ran out, and UserError where the library failed for another reason.
    """
    manager = base.init_continuous_batching(  # type: ignore[operator]  # transformers declares it in a mixin
        generation_config=generation, continuous_batching_config=cache
    )
    written: dict[int, list[int]] = {}
    try:
        manager.start()
        for i, ids in enumerate(prompts):
            manager.add_request(ids, request_id=str(i))
        while len(written) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching stopped before all completions were written")
            elif result.error is not None:
                if is_out_of_memory(RuntimeError(result.error)):
                    raise torch.OutOfMemoryError(result.error)
                raise UserError(
                    f"rollout.engine = paged failed ({result.error}): lower rollout.batch_size if memory is short, or "
                    "use rollout.engine=transformers"
                )
            else:
                written[int(result.request_id)] = result.generated_tokens
                finished()
    finally:
        manager.stop(block=True, hard_stop=len(written) < len(prompts))
        manager.destroy()
    return [written[i] for i in range(len(prompts))]
