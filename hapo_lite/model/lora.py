"""The adapter of a linear layer as two products, in training and in sampling alike: base(x) + scaling (x A^T) B^T.

The second product adds to the base's output in its place, and rounds once. peft copies that output, scales the second
product and adds it, each in a pass over memory, and in 16 bits it rounds after each.

Axes: N tokens, r the adapter's rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn


def use_two_products(model: nn.Module) -> None:
    """Give the LoRA layers of linear layers this forward. Layers of other kinds keep peft's."""
    for layer in model.modules():
        if type(layer) in (Linear, Linear4bit):
            vars(layer)["forward"] = TwoProducts(cast(Linear, layer))


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
    """down: A [r, in]; up: B [out, r]; scaling: what B A is multiplied by."""

    down: Tensor
    up: Tensor
    scaling: float

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.down.to(dtype), self.up.to(dtype), self.scaling)


class TwoProducts:
    """The forward of a LoRA layer. held: its factors within `held_factors`, else None."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer
        self.base: nn.Module = layer.get_base_layer()
        self.held: Factors | None = None

    def factors(self) -> Factors | None:
        """The adapter as it is; None where the layer does anything but add one adapter's B A x to its output."""
        layer, names = self.layer, self.layer.active_adapters
        if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
            return None
        [name] = names
        dropout = layer.lora_dropout[name]
        noisy = dropout.training and not isinstance(dropout, nn.Identity)
        if noisy or name in layer.lora_variant or layer.lora_bias[name]:
            return None
        # peft's dictionaries of modules do not say that a linear layer's factors are linear layers.
        down, up = cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])
        return Factors(down.weight, up.weight, layer.scaling[name])

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
            out = _Adapter.apply(out, rows, *factors)
        else:
            _add(out, rows, *factors)
        return out.view(*x.shape[:-1], out.shape[-1])


def _add(out: Tensor, rows: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Add scaling (x A^T) B^T to `out`, [N, out], in its place. Returns x A^T, [N, r]. rows: x, [N, in]."""
    inner = nn.functional.linear(rows, down)
    if inner.dtype != out.dtype:  # Autocast gives it another dtype than its factors where `out` is in fp32.
        inner = inner.to(out.dtype)
    out.addmm_(inner, up.T, alpha=scaling)
    return inner


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
