"""Fused attention in training on a card that has none for grouped keys.

In training there is no mask, and transformers then hands torch grouped keys and values as they are. torch's kernels for
them need compute capability 8.0. On an older card, such as a T4, torch falls back to plain products, which keep every
score in fp32 for the backward. Its memory-efficient kernel runs there, and takes one key head for each query head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

GROUPED_KEYS_SINCE = (8, 0)
"""The first compute capability whose fused kernels take grouped keys."""


def takes_grouped_keys(device: torch.device) -> bool:
    """Whether fused attention takes grouped keys on `device`. On a CPU it does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= GROUPED_KEYS_SINCE


def use_fused_attention(device: torch.device) -> None:
    """Make `sdpa` of transformers repeat grouped keys and values, in this process, if `device` needs that.

    The results are those of grouped keys, apart from the order of sums.
    """
    if not takes_grouped_keys(device):
        AttentionInterface.register("sdpa", attend_with_repeated_keys)


def attend_with_repeated_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa with one key head for each query head.

    query: [B, heads, L, width]; key, value: [B, key heads, L, width]. Returns [B, L, heads, width].
    """
    groups = query.shape[1] // key.shape[1]
    # transformers asks torch for grouped keys if the module names groups.
    ungrouped: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return sdpa_attention_forward(
        ungrouped, query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, **options
    )
