"""Sampling through the continuous batching of transformers: a paged cache, and a new row as soon as one has ended.

Its own sampling is put aside: a logits processor draws each token from random numbers fixed in advance and leaves no
other choice, so that a completion depends neither on the batch nor on the schedule. Axes: B requests, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from hapo_lite.errors import UserError
from hapo_lite.model.oom import is_shortage
from hapo_lite.records import Completion
from hapo_lite.rollout.batched_engine import WAVE, BatchedEngine
from hapo_lite.rollout.engine import Request
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import Scribe

BLOCK_TOKENS, FLASH_BLOCK_TOKENS = 32, 256
"""Tokens in a block of the cache; flash attention reads pages of 256."""
READ_TOKENS = 256
"""Prompt tokens read in one step, at most, beside the tokens being written."""
MEMORY_SHARE = 0.9
"""Share of the free memory that the cache may take."""


class PagedEngine(BatchedEngine):
    """Samples with the policy's own model, as `TransformersEngine` does. batch_size: completions written at once."""

    @property
    def part_size(self) -> int:
        return WAVE * self.batch_size

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        limit = draws.shape[0]
        sampler = _Sampler(Scribe(processor, draws, self.writing.drew), [len(r.prompt.ids) for r in requests])
        with self.policy.sampling() as model, _paged(model.get_base_model(), sampler) as base:
            written = _generate(
                base,
                [list(r.prompt.ids) for r in requests],
                GenerationConfig(
                    max_new_tokens=limit,
                    do_sample=False,  # the processor has drawn; what is left is to take its choice
                    pad_token_id=self.policy.tokenizer.pad_token_id,
                    eos_token_id=list(self.policy.stop_ids),
                ),
                self._cache(requests, limit, base.config._attn_implementation),
                self.writing.finished,
            )
        return sampler.scribe.completions(requests, written, self.policy)

    def _cache(self, requests: Sequence[Request], limit: int, attention: str) -> ContinuousBatchingConfig:
        """A cache that holds the longest completions of a whole batch, so that none is ever evicted."""
        rows = min(self.batch_size, len(requests))
        block = FLASH_BLOCK_TOKENS if "flash" in attention else BLOCK_TOKENS
        longest = max(len(r.prompt.ids) for r in requests) + limit
        return ContinuousBatchingConfig(
            block_size=block,
            num_blocks=rows * (-(-longest // block) + 1),  # a row may be given its next block early
            max_batch_tokens=rows + READ_TOKENS,
            max_requests_per_batch=rows,
            max_memory_percent=MEMORY_SHARE,
            safety_margin=0.0,
            per_request_processors=True,
            use_async_batching=False,  # the step of a row has to be known when its token is drawn
            use_cuda_graph=False,
        )


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Tells the scribe which token of which request each row is.

    A row is known by one integer, step * B + request, which travels with it to the device.
    """

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012, the base class's declaration
    ignored_kwargs = ()

    def __init__(self, scribe: Scribe, prompt_lengths: Sequence[int]) -> None:
        self.scribe, self.prompt_lengths = scribe, prompt_lengths
        self.drawing = 0

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list) -> Tensor:
        places = []
        for state in (r.state for r in requests_with_new_token):
            request = int(state.request_id)
            # A request that lost its blocks starts again with what it has written as a part of its prompt.
            step = len(state.initial_tokens) + len(state.generated_tokens) - self.prompt_lengths[request]
            places.append(step * len(self.prompt_lengths) + request)
        self.drawing = len(places)
        return torch.tensor(places, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        # Rows of prompts that have been read in part come after those that get a token, with numbers of another step.
        places = tensor_arg[: self.drawing].long()
        requests = len(self.prompt_lengths)
        scores[: self.drawing] = self.scribe(scores[: self.drawing], places // requests, places % requests)
        return scores


# Only processors that are listed here are told which request a row belongs to.
CLASSIC_TO_CB_PROCESSORS_MAP[_Sampler] = lambda sampler: sampler


@contextlib.contextmanager
def _paged(base: PreTrainedModel, sampler: _Sampler) -> Iterator[PreTrainedModel]:
    """The model with paged attention and `sampler` as its only processor, and afterwards as it was.

    Continuous batching takes no `logits_processor`: it asks the model for its list, from the generation settings.
    """
    attention = base.config._attn_implementation
    base._get_logits_processor = lambda *_, **__: LogitsProcessorList([sampler])
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
    """What was written after each prompt; `finished` is called as each one ends.

    `generate_batch` would swallow the exception that a signal raises.
    """
    manager = base.init_continuous_batching(generation_config=generation, continuous_batching_config=cache)
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
                if is_shortage(RuntimeError(result.error)):
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
