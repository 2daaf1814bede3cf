"""A policy without numbers: the model's own code on tensors that have a shape, a dtype and no data.

What it allocates is what the real one allocates, apart from what stands in here: 4-bit layers, and fused attention,
whose kernels need data. Axes: B sequences, L tokens of a sequence, N tokens flattened, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv

from hapo_lite.errors import UserError
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.recipe import ModelSettings

BLOCK, NESTED_BLOCK = 64, 256
"""NF4: weights that share a scale, and scales that share one of their own (double quantisation)."""
FUSED = "shape_only"


def load_config(settings: ModelSettings) -> PretrainedConfig:
    """The model's config.json, from a folder or the hub; no weights. Raises UserError if there is none."""
    name = str(TINY_MODEL) if settings.name == "tiny" else settings.name
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, revision=settings.revision)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model.name = {settings.name} comes with code of its own, which preflight does not run, so its "
                "shapes are not known"
            ) from error
        raise UserError(
            f"model.name = {settings.name} has no config.json, neither in a folder here nor on the hub: check the "
            f"name and the network ({first})"
        ) from error


@contextlib.contextmanager
def computing_in(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Mixed precision as accelerate switches it on: bf16 and fp16 by autocast, fp32 without."""
    narrow = dtype != torch.float32
    with torch.autocast("cpu", dtype if narrow else torch.bfloat16, enabled=narrow):
        # peft asks for the GPU's switch, and casts to fp32 where it is off.
        was = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", narrow and device == "cuda")
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", was)


def build(settings: ModelSettings, config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode) -> PeftModel:
    """The policy's model as `load_policy` makes it, in training mode, its tensors being `mode`'s."""
    with torch.device("meta"):
        model = _adapted(settings, config, dtype)
    # peft cannot move mode's tensors about, and the meta device knows no mixed precision.
    made: dict[int, Tensor] = {}

    def like(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return made[id(old)]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {name: like(old) for name, old in tensors.items() if old is not None}
    return model.train()


def _adapted(settings: ModelSettings, config: PretrainedConfig, dtype: torch.dtype) -> PeftModel:
    attention = "eager" if settings.attention == "eager" else FUSED
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    head = base.get_output_embeddings()
    if settings.quantization == "nf4":
        for name, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                base.set_submodule(name, _Linear4bit(module, dtype))
        base.is_loaded_in_4bit = True
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = settings.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    try:
        return get_peft_model(
            base, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
        )
    except ValueError as error:
        raise UserError(f"model.lora.targets = {targets!r} does not fit {settings.name}: {error}") from error


class _Linear4bit(Linear4bit):
    """The sizes of a 4-bit layer: packed weight, scales, scales of scales; and those of what it computes."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, dtype
        count = linear.weight.numel()
        blocks = -(-count // BLOCK)
        self.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
        self.register_buffer("scales", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-blocks // NESTED_BLOCK)))
        self.register_buffer("codes", torch.empty(16 + 256 + 1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        out = _FourBitProduct.apply(x.to(self.compute_dtype), self.out_features, self.scales, bias)
        return out.to(x.dtype)


class _FourBitProduct(torch.autograd.Function):
    """x W^T with W [out, in] unpacked for the time of the product, forward and backward; x is not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, features: int, scales: Tensor, bias: Tensor | None) -> Tensor:
        ctx.features, ctx.scales = features, scales
        return nn.functional.linear(x, _unpacked(x, features, scales), bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        width = BLOCK * ctx.scales.numel() // ctx.features
        return grad @ _unpacked(grad.new_empty(0, width), ctx.features, ctx.scales), None, None, None


def _unpacked(x: Tensor, features: int, scales: Tensor) -> Tensor:
    full_scales = scales.float() + 0.0
    weight = x.new_empty(features, x.shape[-1])
    del full_scales
    return weight


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and a log-sum-exp a query, and no scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _attention(module, query, key, value, attention_mask, **options) -> tuple[Tensor, None]:
    """As transformers' sdpa: grouped keys go in as they are, unless there is a mask."""
    if attention_mask is not None:
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _mask(batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options):
    if attention_mask is None:
        return None
    return torch.empty(batch_size, 1, int(q_length), int(kv_length), dtype=torch.bool)


AttentionInterface.register(FUSED, _attention)
AttentionMaskInterface.register(FUSED, _mask)
