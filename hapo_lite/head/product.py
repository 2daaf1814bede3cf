"""The product h W^T: the dtype of its factors, and how to store it in 16 bits without harm to the likely entries.

A plain product in bf16 is off by up to 0.06 where a logit is 30. Here a reference near a row's largest product is
subtracted before the rounding, so the entries close to the reference keep errors that are small beside 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.head.shape import TILES
from hapo_lite.head.vocabulary import Vocabulary, open_vocabulary


@dataclass(frozen=True)
class Product:
    """factors: dtype that h and W are cast to; result: dtype of h W^T; rounds: it is stored in 16 bits in between."""

    factors: torch.dtype
    result: torch.dtype
    rounds: bool

    @classmethod
    def of(cls, weight: torch.dtype, result: torch.dtype, device: str) -> Product:
        """The product with a weight of that dtype on a device of that type.

        fp16 products are slow or absent on CPUs, and factors of two dtypes have no product: such weights are cast to
        `result`. Only CUDA multiplies 16-bit factors into fp32 without storing the product in 16 bits.
        """
        native = (result, torch.bfloat16) if device == "cpu" else (result, torch.bfloat16, torch.float16)
        factors = weight if weight in native else result
        return cls(factors, result, rounds=factors != result and device != "cuda")

    @property
    def narrow(self) -> bool:
        """Whether the factors have fewer bits than the result."""
        return self.factors != self.result


def result_dtype(hidden: torch.dtype) -> torch.dtype:
    """The dtype of logits, log-probabilities and entropies: fp32, or fp64 for fp64 hidden states."""
    return torch.float64 if hidden == torch.float64 else torch.float32


def product_beside(reference: Tensor, states: Tensor, tile: Tensor, rounded: Tensor, out: Tensor) -> None:
    """out [n, v] = states [n, D] @ tile^T [D, v], stored in 16 bits in between, relative to `reference` [n].

    rounded: a buffer [n, v] of the factors' dtype.
    """
    # Rounded first: what is added back must be what was subtracted.
    reference = reference.to(rounded.dtype)[:, None]
    rounded.copy_(reference.neg())
    torch.addmm(rounded, states, tile.T, out=rounded)
    out.copy_(rounded).add_(reference.to(out.dtype))


@torch.no_grad()
def next_token_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + bias for a sampler, formed as `token_logprobs` forms it: [N, D], [V, D], [V] -> [N, V], no gradient.

    weight: as for `token_logprobs`. The result is fp32, or fp64 for fp64 input. The likely entries of a row, which lie
    near its largest one, keep small absolute errors also where the factors are bf16.
    """
    vocabulary = open_vocabulary(weight)
    product = Product.of(vocabulary.dtype, result_dtype(hidden.dtype), hidden.device.type)
    states = hidden.to(product.factors)
    with torch.autocast(hidden.device.type, enabled=False):
        if product.rounds:
            logits = _logits_by_tiles(states, vocabulary, product.result)
        else:
            tile = vocabulary[:].to(product.factors)
            logits = torch.mm(states, tile.T, out_dtype=product.result) if product.narrow else states @ tile.T
    return logits if bias is None else logits.add_(bias)


def _logits_by_tiles(states: Tensor, vocabulary: Vocabulary, dtype: torch.dtype) -> Tensor:
    """The product of states [n, D] with all of `vocabulary`, [n, V] in `dtype`; the factors are narrower."""
    size, width = vocabulary.shape[0], TILES["cpu"][1]
    logits = states.new_empty(states.shape[0], size, dtype=dtype)
    buffer = states.new_empty(states.shape[0] * width)
    reference = None
    for start in range(0, size, width):
        tile, out = vocabulary[start : start + width], logits[:, start : start + width]
        if reference is None:
            reference = torch.mm(states, tile.T).amax(dim=1).to(dtype)
        product_beside(reference, states, tile, buffer[: out.numel()].view(out.shape), out)
        reference = torch.maximum(reference, out.amax(dim=1))
    return logits
