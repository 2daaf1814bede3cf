"""A policy without data: the model's own code on tensors that have a shape and a dtype only.

It allocates what the real policy allocates. 4-bit layers and fused attention are replaced, since their kernels need
data. Axes: B sequences, L tokens of a sequence, N tokens flattened, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.adapter import adapted
from hapo_lite.model.refusals import known_problem, no_fused_attention
from hapo_lite.model.unpacked import unpack
from hapo_lite.recipe import ModelSettings
from hapo_lite.tiny.bundled import loadable

BLOCK = 64
"""Number of NF4 weights that share a scale."""
NESTED_BLOCK = 256
"""Number of scales that share a scale of their own (double quantisation)."""
FUSED, REPEATED = "shape_only", "shape_only_repeated"
"""Names under which the stand-ins for fused attention are registered: with grouped keys, and with repeated ones."""


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The model's config.json, from a folder or the hub; no weights. Raises UserError if there is none to use."""
    name = loadable(settings.name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, revision=settings.revision)
    except (OSError, ValueError, KeyError) as error:
        first = first_line(error)
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.name = {settings.name} comes with code of its own, which preflight does not run, so its "
                "shapes are not known"
            ) from error
        # transformers raises OSError both where there is no such file and where its JSON is broken.
        if not isinstance(error, OSError) or (Path(name) / "config.json").is_file():
            raise UserError(
                f"the config.json of model.name = {settings.name} cannot be used ({first}): choose another model or "
                "another version of transformers"
            ) from error
        raise UserError(
            f"model.name = {settings.name} has no config.json, neither in a folder here nor on the hub: check the "
            f"name and the network ({first})"
        ) from error


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """A context with the mixed precision that accelerate uses: autocast for bf16 and fp16, none for fp32."""
    narrow = dtype != torch.float32
    with torch.autocast("cpu", dtype if narrow else torch.bfloat16, enabled=narrow):
        # peft asks for the GPU's switch, and casts to fp32 where it is off.
        was = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", narrow and device == "cuda")
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", was)


def build(
    settings: ModelSettings,
    config: PretrainedConfig,
    dtype: torch.dtype,
    mode: FakeTensorMode,
    grouped_keys: bool = True,
) -> PeftModel:
    """The policy's model as `load_policy` makes it, in training mode, with tensors of `mode`.

    grouped_keys: whether the card's fused attention takes grouped keys (model/attention.py).
    """
    with torch.device("meta"):
        model = _adapted(settings, config, dtype, FUSED if grouped_keys else REPEATED)
    # The model is built on the meta device, since peft cannot move tensors of `mode`. Its tensors are then replaced by
    # tensors of `mode`, since the meta device has no mixed precision.
    with mode:
        replace = _Replacements()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = replace.parameter(parameter)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = replace.tensor(buffer)
    return model.train()


class _Replacements:
    """New tensors in place of old ones. Tensors that are shared by several modules stay shared."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def tensor(self, old: Tensor) -> Tensor:
        """An empty tensor like `old`."""
        if id(old) not in self._made:
            self._made[id(old)] = torch.empty(old.shape, dtype=old.dtype)
        return self._made[id(old)]

    def parameter(self, old: nn.Parameter) -> nn.Parameter:
        """An empty parameter like `old`."""
        if id(old) not in self._made:
            self._made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
        made = self._made[id(old)]
        assert isinstance(made, nn.Parameter)
        return made


def _adapted(settings: ModelSettings, config: PretrainedConfig, dtype: torch.dtype, fused: str) -> PeftModel:
    attention = "eager" if settings.attention == "eager" else fused
    base: Any = _base(settings, config, dtype, attention)
    head = base.get_output_embeddings()
    if settings.quantization == "nf4":
        kept = HfQuantizer.get_modules_to_not_convert(base, None, base._keep_in_fp32_modules)
        for name, module in list(base.named_modules()):
            # As transformers chooses them: a class of its own is left alone.
            chosen = type(module) in (nn.Linear, Conv1D) and should_convert_module(name, kept)
            if chosen and module is not head:
                base.set_submodule(name, _Linear4bit(module, dtype))
        base.is_loaded_in_4bit = True
        # Read by models that multiply by a layer's weight themselves.
        base.config.get_text_config()._is_quantized = True
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted(base, settings)


def _base(settings: ModelSettings, config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The base without data. Raises UserError if transformers has no such model, or not with this attention."""
    try:
        try:
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        except KeyError:  # the model chooses among attentions of its own by name
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=settings.attention)
    except (ValueError, ImportError) as error:
        problem = known_problem(settings, error)
        raise UserError(problem or f"model.name = {settings.name} cannot be built: {first_line(error)}") from error
    if settings.attention == "sdpa" and not base._supports_sdpa:
        raise UserError(no_fused_attention(settings.name))
    return cast(PreTrainedModel, base)


class _Linear4bit(Linear4bit):
    """A 4-bit layer's tensors (packed weight, scales, scales of scales), and the memory of its products."""

    scales: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        rows, columns = linear.weight.shape
        # A Conv1D, which GPT-2 has, stores its weight the other way round.
        self.out_features, self.in_features = (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)
        self.compute_dtype = dtype
        count = linear.weight.numel()
        blocks = math.ceil(count / BLOCK)
        packed = nn.Parameter(torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8), requires_grad=False)
        # peft reads these from bitsandbytes' own class of parameters.
        setattr(packed, "compress_statistics", True)  # noqa: B010 (nn.Parameter has no such attribute)
        setattr(packed, "quant_type", "nf4")  # noqa: B010
        self.weight = packed
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(math.ceil(blocks / NESTED_BLOCK)))
        self.register_buffer("codes", torch.empty(16 + 256 + 1))
        self.bias = linear.bias

    @property
    def W_q(self) -> Tensor:
        """The packed weight. peft unpacks a layer that has this name by its `dequantize`."""
        return self.weight

    def dequantize(self) -> Tensor:
        """An empty weight, [out, in]. DoRA's magnitudes are made from the real one."""
        return torch.empty(self.out_features, self.in_features, dtype=self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out = _FourBitProduct.apply(x.to(self.compute_dtype), self.out_features, self.scales, bias)
        return out.to(x.dtype)


@unpack.register
def _(layer: _Linear4bit, dtype: torch.dtype) -> Tensor:
    return _unpacked(torch.empty(0, layer.in_features, dtype=dtype), layer.out_features, layer.scales)


class _FourBitProduct(torch.autograd.Function):
    """x W^T, where W [out, in] is unpacked only during the product, forward and backward. x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: int, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.shape = features, x.shape[-1]
        ctx.scales = scales
        return nn.functional.linear(x, _unpacked(x, features, scales), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, width = ctx.shape
        return grad @ _unpacked(grad.new_empty(0, width), features, ctx.scales), None, None, None


def _unpacked(x: Tensor, features: int, scales: Tensor) -> Tensor:
    """A weight like the unpacked one. The scales in fp32 are alive while it is made."""
    full_scales = scales.float() + 0.0
    weight = x.new_empty(features, x.shape[-1])
    del full_scales
    return weight


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one log-sum-exp per query, but no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention like transformers' sdpa, which repeats grouped keys only if there is a mask."""
    if attention_mask is not None:
        return _repeated(module, query, key, value, attention_mask)
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _repeated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention like `attend_with_repeated_keys`."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    if attention_mask is None:
        return None
    return torch.empty(batch_size, 1, int(q_length), int(kv_length), dtype=torch.bool)


AttentionInterface.register(FUSED, _attention)
AttentionInterface.register(REPEATED, _repeated)
AttentionMaskInterface.register(FUSED, _mask)
AttentionMaskInterface.register(REPEATED, _mask)
