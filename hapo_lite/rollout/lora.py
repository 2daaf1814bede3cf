"""The adapter as a decoding step computes it: two products a layer, in the dtype of the base.

peft casts the input to the adapter's fp32, and autocast casts it back. Here A and B are copied in the base's dtype
once. In fp32 the second product adds to the base's output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import cast

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn


@contextlib.contextmanager
def two_products(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context within which the adapter of linear layers is computed so, with its weights as they are at the start.

    dtype: of the model's products. For inference only. Other layers, and layers whose adapter is switched off, keep
    peft's forward.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        vars(layer)["forward"] = _TwoProducts(layer, dtype)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _is_plain(layer: LoraLayer) -> bool:
    """Whether a layer adds one adapter's B A x to its output, and nothing else."""
    if type(layer) not in (Linear, Linear4bit) or layer.disable_adapters or layer.merged:
        return False
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A:
        return False
    return names[0] not in layer.lora_variant and not layer.lora_bias[names[0]]


class _TwoProducts:
    """The forward of a LoRA layer: base(x) + scaling (x A^T) B^T.

    In 16 bits it rounds where the trainer rounds: after each product, after the scale and after the sum. A scale that
    is a power of two rounds nothing, so it is part of B then. down: A^T [in, r]; up: B^T [r, out].
    """

    def __init__(self, layer: LoraLayer, dtype: torch.dtype) -> None:
        [name] = layer.active_adapters
        self.base: nn.Module = layer.get_base_layer()
        # peft's dictionaries of modules do not say that a linear layer's factors are linear layers.
        down, up = cast(nn.Linear, layer.lora_A[name]), cast(nn.Linear, layer.lora_B[name])
        self.down = down.weight.detach().to(dtype).T
        scaling = layer.scaling[name]
        exact = dtype == torch.float32 or math.frexp(scaling)[0] == 0.5
        self.up = up.weight.detach().to(dtype).T * (scaling if exact else 1.0)
        self.scaling = None if exact else scaling

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x)
        inner = x.reshape(-1, x.shape[-1]).to(self.down.dtype) @ self.down
        if out.dtype == inner.dtype == torch.float32 and out.is_contiguous():
            out.view(-1, out.shape[-1]).addmm_(inner, self.up)
            return out
        added = inner @ self.up
        if self.scaling is not None:
            added = added * self.scaling
        return out.add_(added.view(out.shape))
