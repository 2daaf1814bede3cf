"""Predicts the memory of a recipe's worst case from the model's config.json alone.

The worst case has the longest prompts, completions of max_new_tokens, and micro-batches filled to the budget. The
model's own code runs on tensors without data (shapes.py), and the bytes of the live ones are counted (live.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from hapo_lite.errors import UserError, first_line
from hapo_lite.head import tile_shape
from hapo_lite.model.attention import takes_grouped_keys
from hapo_lite.model.decoder import cache_name, decoder_of, head_input
from hapo_lite.model.load import resolve_dtype
from hapo_lite.model.lora import held_factors
from hapo_lite.model.policy import trainers_head
from hapo_lite.model.refusals import no_cache, place_in_model
from hapo_lite.model.unpacked import BESIDE_ACTIVATIONS, UnpackedBase, Unpacking
from hapo_lite.recipe import Recipe
from hapo_lite.rollout.attention import NotCovered, covers
from hapo_lite.rollout.cache import FixedCache
from hapo_lite.rollout.forward import FixedForward, GrowingForward, read_prompts
from hapo_lite.rollout.sampling import AdaptiveTemperature, draw
from hapo_lite.rollout.transcript import Transcript
from hapo_lite.train.memory.live import LiveBytes, TooManyOperators, tensors_of, total_bytes
from hapo_lite.train.memory.shapes import FUSED, build, computing_in, load_config

PARTS = (
    "base weights",
    "unpacked base",
    "adapter",
    "optimiser",
    "gradients",
    "KV cache",
    "activations kept",
    "head tiles",
    "at work",
)
"""The parts of a stage's memory at its peak. at work: tensors that live only during an operator or a layer."""


class Unpredictable(UserError):
    """A model's code cannot run on tensors without data."""


@contextlib.contextmanager
def predicting(name: str) -> Iterator[None]:
    """A context that turns an error of a model's code on tensors without data into Unpredictable. name: model.name."""
    # torch prints an error that a model's code may catch.
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    before = torchs.level
    torchs.setLevel(logging.CRITICAL)
    try:
        yield
    except (UserError, NotCovered):
        raise
    except Exception as error:
        place = place_in_model(error, through_ours=True)  # tensors are counted by code of ours
        if isinstance(error, TooManyOperators):
            place = place or "its backward pass"  # which runs no line of the model's code
        if place is None:
            raise
        advice = "start the run where the card is, which halves its batches if memory runs out"
        if "uint8" in str(error):
            advice = "its code multiplies by packed weights itself, so set model.quantization=none"
        raise Unpredictable(
            f"the memory of model.name = {name} cannot be predicted: its code does not run on tensors without numbers "
            f"({place}: {type(error).__name__}: {first_line(error)}); {advice}"
        ) from error
    finally:
        torchs.setLevel(before)


@dataclass(frozen=True)
class Stage:
    """Bytes of one stage at its peak, by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def beside(self, unpacked: int) -> Stage:
        """The same stage with an unpacked copy of the base of `unpacked` bytes."""
        return Stage(self.name, self.parts | {"unpacked base": unpacked})


@dataclass(frozen=True)
class Sizes:
    """prompt, completion: lengths in tokens. rows: completions sampled at once, for `prompts` prompts. batch: number of
    sequences in one micro-batch, with `width` tokens each.
    """

    prompt: int
    completion: int
    rows: int
    prompts: int
    batch: int
    width: int


def worst_case(recipe: Recipe, context: int) -> Sizes:
    """The largest sizes that the recipe allows. context: the model's longest sequence.

    A micro-batch's sequences are stretched until they fill its budget. The longest real ones may leave part of the
    budget unused, but somewhat shorter ones could fill it.
    """
    completion = min(recipe.rollout.max_new_tokens, context - 1)
    prompt = max(1, min(recipe.data.max_prompt_tokens, context - completion))
    samples = recipe.rollout.completions_per_prompt
    rows = min(recipe.rollout.batch_size, recipe.rollout.prompts_per_iteration * samples)
    length = prompt + completion
    budget = recipe.training.micro_batch_tokens
    batch = max(1, min(budget // length, recipe.rollout.prompts_per_iteration * samples))
    width = max(length, min(budget // batch, context)) if batch > 1 else length
    return Sizes(prompt, completion, rows, math.ceil(rows / samples), batch, width)


def unpacking(recipe: Recipe) -> Unpacking:
    """What the recipe asks for: a 4-bit base that is unpacked for the rollout always, never, or if memory is free."""
    settings = recipe.rollout
    if recipe.model.quantization == "none" or settings.engine not in ("transformers", "paged"):
        # Other engines hold a base of their own, or call layers in ways that unpacking does not cover.
        return Unpacking.NEVER
    asked = {"always": Unpacking.ALWAYS, "never": Unpacking.NEVER, "auto": Unpacking.IF_FREE}
    return asked[settings.unpacked_base]


def grouped_keys(device: str, dtype: torch.dtype) -> bool:
    """Whether fused attention takes grouped keys on this machine's card or, for a card elsewhere, judged by `dtype`.

    The cards that have bf16 are those whose fused attention takes grouped keys, so fp16 stands for an older card.
    """
    if device == "cuda" and torch.cuda.is_available():
        return takes_grouped_keys(torch.device("cuda"))
    return device == "cpu" or dtype != torch.float16


def cached_tensors(layer: Any) -> list[Tensor]:
    """The tensors that a layer of a cache keeps: keys and values, or the states of linear attention."""
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None), *states) if t is not None]


class Predictor:
    """Predicts for one model and one type of device ("cuda" or "cpu"). Recipes may differ in all but `model`.

    dtype: the dtype that the model computes in; None: the recipe's, on this machine.
    """

    def __init__(self, recipe: Recipe, device: str, dtype: torch.dtype | None = None) -> None:
        self.recipe = recipe
        self.device = device
        self.config: PretrainedConfig = load_config(recipe.model)
        self.dtype = dtype or resolve_dtype(recipe.model.dtype, torch.device(device))
        self.context = getattr(self.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        self.mode = FakeTensorMode()
        self.fixed = True  # the default engine's cache is allocated once, unless the model turns out not to allow it
        with predicting(recipe.model.name):
            self.model: PeftModel = build(
                recipe.model, self.config, self.dtype, self.mode, grouped_keys(device, self.dtype)
            )
        self.adapter = [p for p in self.model.parameters() if p.requires_grad]
        adapter = total_bytes(self.adapter)
        self.resident = {
            "base weights": total_bytes(tensors_of(self.model)) - adapter,
            "adapter": adapter,
            "optimiser": optimizer_bytes(recipe.training.optimizer, self.adapter),
        }

    def stages(self, recipe: Recipe | None = None, room: int = 0) -> list[Stage]:
        """Rollout, scoring and update at the recipe's worst case. room: bytes of tensors that fit into memory.

        Raises Unpredictable.
        """
        recipe = recipe or self.recipe
        sizes = worst_case(recipe, self.context)
        with predicting(recipe.model.name):
            rollout, scoring, update = self.rollout(recipe, sizes), self.score(sizes), self.update(sizes)
        if self.unpacks(recipe, rollout, room):
            rollout = rollout.beside(self.unpacked)
            if self.device == "cpu":  # On a GPU scoring uses the packed kernels, as the update does.
                scoring = scoring.beside(self.unpacked)
        if self.unpacks_in_update(recipe, room):
            update = update.beside(self.unpacked)
        return [rollout, scoring, update]

    @property
    def unpacked(self) -> int:
        """Bytes of the base's unpacked copy; 0 for a base that is not in 4 bits."""
        return UnpackedBase(self.model, Unpacking.NEVER).size

    def unpacks(self, recipe: Recipe, rollout: Stage, room: int) -> bool:
        """Whether the base is unpacked: as the recipe says or, if that is "auto", if the copy fits beside the rollout.

        On a CPU the copy must fit twice, as `UnpackedBase` asks.
        """
        if not self.unpacked:
            return False
        wanted = unpacking(recipe)
        if not wanted.left_open:
            return wanted is Unpacking.ALWAYS
        copies = 1 if self.device == "cuda" else 2
        return rollout.total + copies * self.unpacked <= room

    def unpacks_in_update(self, recipe: Recipe, room: int) -> bool:
        """Whether an update uses the copy: on a CPU, if it is small beside what is free then."""
        free = room - sum(self.resident.values())
        asked = self.device == "cpu" and unpacking(recipe) is not Unpacking.NEVER
        return asked and 0 < self.unpacked <= BESIDE_ACTIVATIONS * free

    def rollout(self, recipe: Recipe, sizes: Sizes) -> Stage:
        """Reading the prompts, or the last step of all rows at full length, whichever takes more memory."""
        try:
            return self._rollout(recipe, sizes)
        except NotCovered:
            self.fixed = False
            return self._rollout(recipe, sizes)

    def _rollout(self, recipe: Recipe, sizes: Sizes) -> Stage:
        settings = recipe.rollout
        if cache_name(self.base) is None:
            raise UserError(no_cache(recipe.model.name, self.base))
        cache = DynamicCache(config=self.config.get_text_config())
        self.model.eval()
        with (
            self.mode,
            torch.no_grad(),
            computing_in(self.dtype, self.device),
            trainers_head(self.base),
            LiveBytes(tensors_of(self.model)) as live,
            held_factors(self.model, self.dtype),
        ):
            transcript = Transcript(sizes.completion, sizes.rows, torch.device("cpu"))
            mask = torch.ones(sizes.prompts, sizes.prompt, dtype=torch.long)
            read_prompts(self.base, torch.empty_like(mask), mask, cache)
            forward = self._last_step(cache, mask, sizes)
            with forward.reading():
                forward.prepare(sizes.rows)
                some = torch.zeros(sizes.rows, dtype=torch.long)
                logits = forward.logits(some, some[:, None])
            layers = cast(list[Any], forward.cache.layers)
            kept = total_bytes([tensor for layer in layers for tensor in cached_tensors(layer)])
            processor = AdaptiveTemperature(
                None, settings.temperature, 0.0, settings.top_p, settings.top_k, settings.min_p
            )
            transcript.write(some[:1], torch.arange(sizes.rows), draw(processor, logits, torch.empty(sizes.rows)))
        self.model.train()
        return Stage("rollout", self.resident | {"KV cache": kept, "at work": live.peak - kept})

    def _last_step(self, cache: DynamicCache, mask: Tensor, sizes: Sizes) -> FixedForward | GrowingForward:
        """The model before the last step of the longest rows. cache, mask: of the prompts."""
        rows, tokens = torch.zeros(sizes.rows, dtype=torch.long), sizes.prompt + sizes.completion - 1
        if self.fixed and self.recipe.model.attention == "sdpa" and covers(self.base, cache, FUSED):
            fixed = FixedCache(cache, rows, mask, tokens)
            fixed.width = tokens - 1
            return FixedForward(self.base, fixed)
        growing = GrowingForward(self.base, cache, rows, mask)
        growing.attention_mask = mask.new_ones(sizes.rows, tokens - 1)
        for layer in cast(list[Any], cache.layers):
            # A layer of linear attention has a state of one size and no keys. Keys and values may differ in width.
            kept = tokens - 1
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length, kept = kept, min(kept, layer.sliding_window - 1)
            for name in ("keys", "values"):
                if (read := getattr(layer, name, None)) is not None:
                    setattr(layer, name, read.new_empty(sizes.rows, read.shape[1], kept, read.shape[3]))
        return growing

    def score(self, sizes: Sizes) -> Stage:
        """The forward pass of one micro-batch."""
        with self.mode, torch.no_grad(), LiveBytes(tensors_of(self.model)) as live:
            _, tiles = self._logprobs(sizes, live)
        return Stage("scoring", self.resident | {"head tiles": tiles, "at work": live.peak - tiles})

    def update(self, sizes: Sizes) -> Stage:
        """Forward and backward of a micro-batch after its step's first, or the optimiser step if that takes more."""
        with self.mode:
            gradients = [torch.empty_like(p) for p in self.adapter]
            for p, gradient in zip(self.adapter, gradients, strict=True):
                p.grad = gradient
            with LiveBytes([*tensors_of(self.model), *gradients]) as live:
                logp, tiles = self._logprobs(sizes, live)
                kept = live.now
                logp.sum().backward()
            for p in self.adapter:
                p.grad = None
        gradient_bytes = total_bytes(gradients)
        parts = self.resident | {"gradients": gradient_bytes}
        step = 0
        if self.recipe.training.optimizer == "adamw" and self.device == "cuda":
            step = gradient_bytes  # torch's AdamW takes the square root of all second moments at once.
        if step > live.peak:
            return Stage("update", parts | {"at work": step})
        working = {"activations kept": kept, "head tiles": tiles, "at work": live.peak - kept - tiles}
        return Stage("update", parts | working)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the adapter's layers in it."""
        # peft's annotation is Module; `build` makes the base from a configuration of transformers.
        return cast(PreTrainedModel, self.model.get_base_model())

    def _logprobs(self, sizes: Sizes, live: LiveBytes) -> tuple[Tensor, int]:
        """Log-probabilities [N], and the bytes of the head's tiles if they are alive at the peak so far, else 0."""
        with computing_in(self.dtype, self.device):
            ids = torch.empty(sizes.batch, sizes.width, dtype=torch.long)
            with self._keeping():
                # A few classes are their own decoder.
                hidden = head_input(self.base, decoder_of(self.base) is self.base, input_ids=ids, use_cache=False)
            decoder_peak = live.peak
            live.peak = live.now
            states = hidden[:, sizes.prompt - 1 : -1].reshape(-1, hidden.shape[-1])
            tiles = self._tile_bytes(states)
            logp = _Head.apply(states, tiles)
        if live.peak > decoder_peak:
            return logp, tiles
        live.peak = decoder_peak
        return logp, 0

    def _keeping(self) -> contextlib.AbstractContextManager[object]:
        """A context in which activation_offload keeps tensors for the backward off the card until they are needed."""
        if not self.recipe.model.offloads or self.device == "cpu":
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1])
        )

    def _tile_bytes(self, states: Tensor) -> int:
        """Bytes of the head's tiles for states [N, D]."""
        tokens, width = states.shape
        rows, columns = tile_shape(self.device, tokens, width, self.config.get_text_config().vocab_size)
        # On a CPU the products of a bf16 head are stored in bf16 too.
        rounded = 2 if self.device == "cpu" and states.dtype == torch.bfloat16 else 0
        return rows * ((8 + rounded) * columns + (16 + rounded) * width)


class _Head(torch.autograd.Function):
    """Allocates as `token_logprobs` does: tiles in forward, and an fp32 row of the Jacobian per token for backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tiles: int) -> Tensor:
        ctx.dtype = states.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.empty(states.shape))
        buffers = torch.empty(tiles, dtype=torch.uint8)
        del buffers
        return torch.empty(states.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0], dtype=ctx.dtype), None


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of the optimiser's two states per parameter. name: training.optimizer.

    8-bit states have a scale for every 256 entries, and bitsandbytes keeps the states of small tensors in fp32. Paged
    states leave the card when it is full and do not count, except those of small tensors, which are not paged.
    """
    total = 0
    for p in parameters:
        count = p.numel()
        if name == "adamw" or count < 4096:
            total += 8 * count
        elif name == "adamw_8bit" or count < 100_000:
            total += 2 * (count + 4 * math.ceil(count / 256))
    return total
