"""Attention of one new token with grouped keys, without a copy of the cache.

Given a mask, transformers repeats keys and values for every query head in every step: the whole cache, once for each
head of a group. With one query position, the heads that share a key head can stand in the place of positions.

Axes: B rows, Q query heads, H key heads, S slots of the cache, W width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hapo_lite.rollout.cache import FixedCache

NAME = "hapo_lite_grouped"
"""The attention's name in transformers. It has no mask function, so models make no mask of their own."""
_reading: ContextVar[FixedCache] = ContextVar("hapo_lite_reading")


class NotCovered(Exception):
    """The model does something with its cache or its attention that a `FixedCache` does not provide."""


def covers(model: PreTrainedModel, cache: Cache, attention: str = "sdpa") -> bool:
    """Whether a `FixedCache` can hold what `cache` holds after the prompts have been read.

    attention: the implementation whose arithmetic this one has, apart from the order of sums.
    Other caches are those of hybrids (recurrent states), of chunked attention, and of models with a class of their own.
    """
    text = model.config.get_text_config()
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return (
        model._supports_attention_backend
        and text._attn_implementation == attention
        and "chunked_attention" not in (getattr(text, "layer_types", None) or ())
        and type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) in plain and layer.keys is not None for layer in cast(list[Any], cache.layers))
    )


@contextlib.contextmanager
def attending(model: PreTrainedModel, cache: FixedCache) -> Iterator[None]:
    """A context within which the model's attention reads `cache`, one new token for each row."""
    before = model.config.get_text_config()._attn_implementation
    token = _reading.set(cache)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        _reading.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options,
) -> tuple[Tensor, None]:
    """query: [B, Q, 1, W]; key, value: what the layer's cache returned. Gives [B, 1, Q, W].

    Raises NotCovered where the model passes on anything else.
    """
    cache, index = _reading.get(), getattr(module, "layer_idx", None)
    if index is None or index >= len(cache.fixed) or attention_mask is not None or position_bias is not None:
        raise NotCovered
    layer = cache.fixed[index]
    if key is not layer.shown[0] or value is not layer.shown[1] or query.shape[2] != 1:
        raise NotCovered
    layer.attended += 1
    rows, heads, _, width = query.shape
    groups = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    out = scaled_dot_product_attention(groups, key, value, attn_mask=layer.ring.shown, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, _attend)
