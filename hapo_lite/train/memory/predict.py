"""What a recipe takes of memory in its worst case, predicted from the model's config.json alone.

The worst case: the longest prompts, every completion of max_new_tokens, micro-batches filled to the budget. The model's
own code runs on tensors without data, and the bytes of what is alive are counted (live.py, shapes.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, PretrainedConfig

from hapo_lite.head import tile_shape
from hapo_lite.model.load import resolve_dtype
from hapo_lite.model.policy import trainers_head
from hapo_lite.model.unpacked import UnpackedBase
from hapo_lite.recipe import Recipe
from hapo_lite.rollout.attention import covers
from hapo_lite.rollout.cache import FixedCache
from hapo_lite.rollout.forward import FixedForward, GrowingForward, read_prompts
from hapo_lite.rollout.lora import two_products
from hapo_lite.rollout.sampling import AdaptiveTemperature, draw
from hapo_lite.rollout.transcript import Transcript
from hapo_lite.train.memory.live import LiveBytes, tensors_of, total_bytes
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
"""What is in a stage's memory at its peak. at work: what is alive only for an operator or a layer."""


@dataclass(frozen=True)
class Stage:
    """Bytes of one stage at its peak, by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def beside(self, unpacked: int) -> Stage:
        """The same with an unpacked copy of the base, in bytes."""
        return Stage(self.name, self.parts | {"unpacked base": unpacked})


@dataclass(frozen=True)
class Sizes:
    """prompt, completion: tokens; rows: completions sampled at once, of `prompts` prompts; batch: sequences in one
    micro-batch, of `width` tokens each.
    """

    prompt: int
    completion: int
    rows: int
    prompts: int
    batch: int
    width: int


def worst_case(recipe: Recipe, context: int) -> Sizes:
    """The largest sizes that the recipe allows. context: the model's longest sequence.

    Sequences are as long as the budget can be filled with: shorter ones would fill it better than the longest.
    """
    completion = min(recipe.rollout.max_new_tokens, context - 1)
    prompt = max(1, min(recipe.data.max_prompt_tokens, context - completion))
    samples = recipe.rollout.completions_per_prompt
    rows = min(recipe.rollout.batch_size, recipe.rollout.prompts_per_iteration * samples)
    length, budget = prompt + completion, recipe.training.micro_batch_tokens
    batch = max(1, min(budget // length, recipe.rollout.prompts_per_iteration * samples))
    width = max(length, min(budget // batch, context)) if batch > 1 else length
    return Sizes(prompt, completion, rows, -(-rows // samples), batch, width)


def unpacking(recipe: Recipe) -> bool | None:
    """Whether the recipe has a 4-bit base unpacked for the rollout; None: where memory allows."""
    settings = recipe.rollout
    if recipe.model.quantization == "none" or settings.engine not in ("transformers", "paged"):
        return False  # the others have a base of their own, or a loop that this cannot reach
    return {"always": True, "never": False, "auto": None}[settings.unpacked_base]


class Predictor:
    """Predicts for one model and one kind of device; recipes may differ in all but `model`."""

    def __init__(self, recipe: Recipe, device: str, dtype: torch.dtype | None = None) -> None:
        """dtype: what the model computes in; None: as the recipe says, on this machine."""
        self.recipe, self.device = recipe, device
        self.config: PretrainedConfig = load_config(recipe.model)
        self.dtype = dtype or resolve_dtype(recipe.model.dtype, torch.device(device))
        self.context = getattr(self.config, "max_position_embeddings", None) or 1 << 20
        self.mode = FakeTensorMode()
        self.model: PeftModel = build(recipe.model, self.config, self.dtype, self.mode)
        self.adapter = [p for p in self.model.parameters() if p.requires_grad]
        adapter = total_bytes(self.adapter)
        self.resident = {
            "base weights": total_bytes(tensors_of(self.model)) - adapter,
            "adapter": adapter,
            "optimiser": optimizer_bytes(recipe.training.optimizer, self.adapter),
        }

    def stages(self, recipe: Recipe | None = None, room: int = 0) -> list[Stage]:
        """Rollout, scoring and update at the recipe's worst case. room: bytes of tensors that there is memory for."""
        recipe = recipe or self.recipe
        sizes = worst_case(recipe, self.context)
        rollout, scoring = self.rollout(recipe, sizes), self.score(sizes)
        if self.unpacks(recipe, rollout, room):
            rollout = rollout.beside(self.unpacked)
            # On a GPU scoring keeps to the kernels that the update will use.
            scoring = scoring.beside(self.unpacked) if self.device == "cpu" else scoring
        return [rollout, scoring, self.update(sizes)]

    @property
    def unpacked(self) -> int:
        """Bytes of the base's unpacked copy; 0 where it is not in 4 bits."""
        return UnpackedBase(self.model, None).size

    def unpacks(self, recipe: Recipe, rollout: Stage, room: int) -> bool:
        """Whether the copy is made: as the recipe says or, where that is left open, if it fits beside the rollout."""
        wanted = unpacking(recipe)
        if wanted is not None or not self.unpacked:
            return bool(wanted and self.unpacked)
        return rollout.total + self.unpacked * (1 if self.device == "cuda" else 2) <= room

    def rollout(self, recipe: Recipe, sizes: Sizes) -> Stage:
        """Reading the prompts, or the last step of all rows at their longest: whichever takes more."""
        settings = recipe.rollout
        base = self.model.get_base_model()
        cache = DynamicCache(config=self.config.get_text_config())
        self.model.eval()
        with (
            self.mode,
            torch.no_grad(),
            computing_in(self.dtype, self.device),
            trainers_head(base),
            LiveBytes(tensors_of(self.model)) as live,
            two_products(self.model, self.dtype),
        ):
            transcript = Transcript(sizes.completion, sizes.rows, torch.device("cpu"))
            mask = torch.ones(sizes.prompts, sizes.prompt, dtype=torch.long)
            read_prompts(self.model, torch.empty_like(mask), mask, cache)
            forward = self._last_step(cache, mask, sizes)
            with forward.reading():
                forward.prepare(sizes.rows)
                some = torch.zeros(sizes.rows, dtype=torch.long)
                logits = forward.logits(some, some[:, None])
            kept = total_bytes(t for layer in forward.cache.layers for t in (layer.keys, layer.values))
            processor = AdaptiveTemperature(None, settings.temperature, 0.0, settings.top_p, settings.top_k)
            transcript.write(some[:1], torch.arange(sizes.rows), draw(processor, logits, torch.empty(sizes.rows)))
        self.model.train()
        return Stage("rollout", self.resident | {"KV cache": kept, "at work": live.peak - kept})

    def _last_step(self, cache: DynamicCache, mask: Tensor, sizes: Sizes) -> FixedForward | GrowingForward:
        """The model before the last step of the longest rows. cache, mask: of the prompts."""
        base = self.model.get_base_model()
        rows, tokens = torch.zeros(sizes.rows, dtype=torch.long), sizes.prompt + sizes.completion - 1
        if self.recipe.model.attention == "sdpa" and covers(base, cache, FUSED):
            fixed = FixedCache(cache, rows, mask, tokens)
            fixed.width = tokens - 1
            return FixedForward(base, fixed)
        growing = GrowingForward(base, cache, rows, mask)
        growing.attention_mask = mask.new_ones(sizes.rows, tokens - 1)
        for layer in cache.layers:
            shape = (sizes.rows, layer.keys.shape[1], tokens - 1, layer.keys.shape[3])
            layer.keys, layer.values = (layer.keys.new_empty(shape) for _ in range(2))
        return growing

    def score(self, sizes: Sizes) -> Stage:
        """The forward pass of one micro-batch."""
        with self.mode, torch.no_grad(), LiveBytes(tensors_of(self.model)) as live:
            tiles = self._logprobs(sizes, live)[1]
        return Stage("scoring", self.resident | {"head tiles": tiles, "at work": live.peak - tiles})

    def update(self, sizes: Sizes) -> Stage:
        """Forward and backward of a micro-batch that is not its step's first; or the optimiser's step."""
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
        own = total_bytes(gradients)
        parts = self.resident | {"gradients": own}
        # torch's AdamW takes the square root of all second moments at once.
        step = own if self.recipe.training.optimizer == "adamw" and self.device == "cuda" else 0
        if step > live.peak:
            return Stage("update", parts | {"at work": step})
        working = {"activations kept": kept, "head tiles": tiles, "at work": live.peak - kept - tiles}
        return Stage("update", parts | working)

    def _logprobs(self, sizes: Sizes, live: LiveBytes) -> tuple[Tensor, int]:
        """Log-probabilities [N], and the bytes of the head's tiles if they are alive at the peak so far, else 0."""
        with computing_in(self.dtype, self.device):
            decoder = self.model.get_base_model().get_decoder()
            ids = torch.empty(sizes.batch, sizes.width, dtype=torch.long)
            with self._keeping():
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            before, live.peak = live.peak, live.now
            states = hidden[:, sizes.prompt - 1 : -1].reshape(-1, hidden.shape[-1])
            tiles = self._tiles(states)
            logp = _Head.apply(states, tiles)
        in_head, live.peak = live.peak > before, max(live.peak, before)
        return logp, tiles if in_head else 0

    def _keeping(self) -> contextlib.AbstractContextManager:
        """With activation_offload, what is kept for the backward is not on the card until it is asked for."""
        if not self.recipe.model.activation_offload or self.device == "cpu":
            return contextlib.nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t.shape, t.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1])
        )

    def _tiles(self, states: Tensor) -> int:
        width = states.shape[1]
        rows, columns = tile_shape(self.device, *states.shape, self.config.get_text_config().vocab_size)
        rounded = 2 if self.device == "cpu" and states.dtype == torch.bfloat16 else 0  # a CPU's products are bf16 too
        return rows * ((8 + rounded) * columns + (16 + rounded) * width)


class _Head(torch.autograd.Function):
    """The sizes of `token_logprobs`: tiles for its forward; for its backward a row of the Jacobian a token, in fp32."""

    @staticmethod
    def forward(ctx, states: Tensor, tiles: int) -> Tensor:
        ctx.dtype = states.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.empty(states.shape))
        buffers = torch.empty(tiles, dtype=torch.uint8)
        del buffers
        return torch.empty(states.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return torch.empty_like(ctx.saved_tensors[0], dtype=ctx.dtype), None


def optimizer_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Two states a parameter, in fp32 or in 8 bits with a scale for every 256 (bitsandbytes leaves the small in fp32).

    Paged states are on the card only while it has room, and count nothing, except small ones, which are not paged.
    """
    total = 0
    for p in parameters:
        count = p.numel()
        if name == "adamw" or count < 4096:
            total += 8 * count
        elif name == "adamw_8bit" or count < 100_000:
            total += 2 * (count + 4 * -(-count // 256))
    return total
