"""The adapter of a linear layer as two products, in training and in sampling alike: base(x) + scaling (x A^T) B^T.

The second product adds to the base's output in its place, and rounds once. peft copies that output, scales the second
product and adds it, each in a pass over memory, and in 16 bits it rounds after each.

DoRA (arXiv 2402.09353, Eq. 5) then multiplies every output but the bias by m / ||W + scaling B A||, where m is trained
and the norm is that of an output's row. The norm needs the whole weight, so the sampler computes it once for a rollout.

Axes: N tokens, r the adapter's rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from bitsandbytes.nn import Linear4bit as Packed
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from hapo_lite.model.unpacked import unpack


def use_two_products(model: nn.Module) -> None:
    """Give the LoRA layers of linear layers this forward. Layers of other kinds keep peft's."""
    for layer in model.modules():
        if type(layer) in (Linear, Linear4bit):
            vars(layer)["forward"] = TwoProducts(cast(Linear, layer))


@torch.no_grad()
def start_magnitudes(model: nn.Module) -> None:
    """Give new DoRA layers the magnitudes at which they leave the base's outputs as they are, to the last bit.

    peft rounds them to the dtype of the base, and a policy in 16 bits would then not begin as its base.
    """
    for layer in model.modules():
        forward = vars(layer).get("forward")
        if isinstance(forward, TwoProducts) and (magnitude := forward.magnitude()) is not None:
            magnitude.copy_(forward.norm())


@contextlib.contextmanager
def held_factors(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context for inference, within which the adapter stays as it is at the start. It is cast to `dtype` once.

    dtype: of the model's products.
    """
    forwards = [vars(layer).get("forward") for layer in model.modules()]
    layers = [forward for forward in forwards if isinstance(forward, TwoProducts)]
    for layer in layers:
        factors = layer.factors()
        layer.held = None if factors is None else factors.to(dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None


class Factors(NamedTuple):
    """down: A [r, in]; up: B [out, r]; scaling: what B A is multiplied by.

    rescale: what DoRA multiplies the outputs by, [out], fp32; None for other variants.
    """

    down: Tensor
    up: Tensor
    scaling: float
    rescale: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.down.to(dtype), self.up.to(dtype), self.scaling, self.rescale)


class TwoProducts:
    """The forward of a LoRA layer. held: its factors within `held_factors`, else None."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer
        self.base: nn.Module = layer.get_base_layer()
        self.held: Factors | None = None

    def factors(self) -> Factors | None:
        """The adapter as it is; None where the layer does anything but apply one LoRA or DoRA adapter to its output."""
        layer, names = self.layer, self.layer.active_adapters
        if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
            return None
        [name] = names
        dropout = layer.lora_dropout[name]
        noisy = dropout.training and not isinstance(dropout, nn.Identity)
        if noisy or layer.lora_bias[name]:
            return None
        magnitude = self.magnitude()
        if name in layer.lora_variant and magnitude is None:
            return None
        # peft's dictionaries of modules do not say that a linear layer's factors are linear layers.
        down, up = cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])
        rescale = None if magnitude is None else magnitude.float() / self.norm()
        return Factors(down.weight, up.weight, layer.scaling[name], rescale)

    def magnitude(self) -> Tensor | None:
        """DoRA's m, [out], of the layer's one adapter; None for another variant."""
        [name] = self.layer.active_adapters
        if type(self.layer.lora_variant.get(name)) is not DoraLinearVariant:
            return None
        return cast(nn.Parameter, self.layer.lora_magnitude_vector[name].weight)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||W + scaling B A|| of every output's row, [out], fp32. It has no gradient (section 4.3 of the paper).

        A row of zeros has the smallest norm above 0 instead, so that its output stays 0.
        """
        [name] = self.layer.active_adapters
        down = cast(nn.Linear, self.layer.lora_A[name]).weight
        up = cast(nn.Linear, self.layer.lora_B[name]).weight
        with torch.autocast(up.device.type, enabled=False):
            changed = torch.addmm(self._weight().float(), up.float(), down.float(), alpha=self.layer.scaling[name])
            norm = torch.linalg.vector_norm(changed, dim=1)
        return norm.clamp_min(torch.finfo(torch.float32).tiny)

    def _weight(self) -> Tensor:
        """The base's weight as its products use it, [out, in]."""
        if isinstance(self.base, Packed):
            return unpack(self.base, self.base.compute_dtype or torch.float32)
        weight = cast(Tensor, self.base.weight)
        return weight.T if self.layer.fan_in_fan_out else weight

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        factors = self.held or self.factors()
        if factors is None:
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        # Of two dimensions, so that the base's output is no view: autograd lets nothing be written into some views.
        rows = x.reshape(-1, x.shape[-1])
        out = self.base(rows)
        if factors.down.dtype != out.dtype:
            factors = factors.to(out.dtype)
        if rows.dtype != out.dtype:
            rows = rows.to(out.dtype)
        if torch.is_grad_enabled():
            out = _Adapter.apply(out, rows, factors.down, factors.up, factors.scaling)
        else:
            _add(out, rows, factors.down, factors.up, factors.scaling)
        if factors.rescale is not None:
            out = _rescaled(out, factors.rescale, cast(Tensor | None, self.base.bias))
        return out.view(*x.shape[:-1], out.shape[-1])


def _add(out: Tensor, rows: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Add scaling (x A^T) B^T to `out`, [N, out], in its place. Returns x A^T, [N, r]. rows: x, [N, in]."""
    inner = nn.functional.linear(rows, down)
    if inner.dtype != out.dtype:  # Autocast gives it another dtype than its factors where `out` is in fp32.
        inner = inner.to(out.dtype)
    out.addmm_(inner, up.T, alpha=scaling)
    return inner


def _rescaled(out: Tensor, rescale: Tensor, bias: Tensor | None) -> Tensor:
    """rescale (out - bias) + bias, [N, out], computed in fp32 and rounded once. rescale: [out], fp32."""
    scaled = out * rescale if bias is None else torch.addcmul(bias * (1.0 - rescale), out, rescale)
    return scaled.to(out.dtype)


class _Adapter(torch.autograd.Function):
    """`_add`, with its gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, rows: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        inner = _add(out, rows, down, up, scaling)
        ctx.mark_dirty(out)
        ctx.save_for_backward(rows, inner, down, up)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, down, up = ctx.saved_tensors
        # Products with r rows, since a CPU's library takes several times as long for those with r columns.
        grad_inner = (up.T @ grad.T).mul_(ctx.scaling)
        grad_up = (inner.T @ grad).mul_(ctx.scaling).T
        grad_rows = grad_inner.T @ down if ctx.needs_input_grad[1] else None
        return grad, grad_rows, grad_inner @ rows, grad_up, None
