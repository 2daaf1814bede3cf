"""A cache of keys and values that is allocated once for all rows and all tokens of a batch.

Axes: P prompts, L tokens of a padded prompt, B rows (completions being written), H key heads, S slots, W width of a
head.

A layer that sees every token has a slot for each token. A layer with a sliding window has as many slots as its window
and uses them as a ring: the token in column t lies in slot t modulo S, and replaces the one that has left the window.
The order of the slots does not matter, because the keys carry their positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

SLOTS = 64
"""Slots are allocated and read in multiples of this number, so that shapes stay the same for many steps. Kernels of a
GPU read a mask without a copy if its width is a multiple of 8."""


def whole_slots(tokens: int) -> int:
    """The slots that are read for so many tokens."""
    return SLOTS * math.ceil(tokens / SLOTS)


class Ring:
    """The place of the next token and the mask, for all layers with the same number of slots.

    size: S; slot: [1], the place of the token that the next step writes; mask: [B, 1, 1, S], added to the scores.
    """

    def __init__(self, size: int, columns: Sequence[int], visible: Tensor, dtype: torch.dtype) -> None:
        """columns: those of the prompts' columns whose keys are kept, in order; visible: [B, L], bool."""
        self.size = size
        # A finite number: rows that are hidden as a whole block of a kernel would otherwise give inf - inf.
        hidden = torch.finfo(dtype).min / 2
        self.mask = torch.full((visible.shape[0], 1, 1, size), hidden, dtype=dtype, device=visible.device)
        for part, places in in_ring(columns, size):
            self.mask[..., places].masked_fill_(visible[:, None, None, part.start : part.stop], 0.0)
        self.slot = torch.full((1,), visible.shape[1] % size, device=visible.device)
        self.shown = self.mask

    def show(self, rows: int, slots: int) -> None:
        """Let attention see the first rows and slots."""
        self.shown = self.mask[:rows, :, :, : min(slots, self.size)]

    def reveal(self) -> None:
        """Let attention see the token that is being written."""
        self.mask.index_fill_(3, self.slot, 0.0)

    def advance(self) -> None:
        self.slot.add_(1).remainder_(self.size)


def in_ring(columns: Sequence[int], size: int) -> list[tuple[range, slice]]:
    """Where consecutive columns lie in a ring: each part that the ring's end does not break, and that part's slots."""
    parts, start = [], columns[0]
    end = columns[-1] + 1
    while start < end:
        stop = min(end, start - start % size + size)
        parts.append((range(start, stop), slice(start % size, start % size + stop - start)))
        start = stop
    return parts


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H, S, W] each. `shown` are those that attention reads."""

    is_compileable = True

    def __init__(self, ring: Ring, rows: Tensor, columns: Sequence[int], grown: DynamicLayer) -> None:
        """rows: [B], the prompt of each row; grown: the layer after the prompts have been read, with `columns`."""
        super().__init__()
        self.ring = ring
        self.is_sliding = grown.is_sliding
        assert grown.keys is not None and grown.values is not None
        self.keys = _spread(grown.keys, rows, columns, ring.size)
        self.values = _spread(grown.values, rows, columns, ring.size)
        self.is_initialized = True
        self.attended = 0
        self.show(rows.shape[0], ring.size)

    def show(self, rows: int, slots: int) -> None:
        """Let attention see the first rows and slots."""
        assert self.keys is not None and self.values is not None
        self._written = self.keys[:rows], self.values[:rows]
        self.shown = self.keys[:rows, :, :slots], self.values[:rows, :, :slots]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token of each row, and give all that attention reads."""
        for kept, new in zip(self._written, (key_states, value_states), strict=True):
            kept.index_copy_(2, self.ring.slot, new)
        return self.shown

    def move(self, sources: Tensor, places: Tensor, slots: int) -> None:
        """Copy the first slots of the rows `sources` into the rows `places`."""
        assert self.keys is not None and self.values is not None
        for kept in (self.keys[:, :, :slots], self.values[:, :, :slots]):
            kept.index_copy_(0, places, kept.index_select(0, sources))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a fixed layer is made with its memory")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.shown[0].shape[2], 0

    def get_seq_length(self) -> int:
        return self.shown[0].shape[2]

    def get_max_length(self) -> int:
        return self.ring.size


def _spread(prompts: Tensor, rows: Tensor, columns: Sequence[int], size: int) -> Tensor:
    """Keys or values [B, H, S, W] with the prompts' [P, H, L, W] in their slots, and zeros in the others."""
    shape = (rows.shape[0], prompts.shape[1], size, prompts.shape[3])
    # Zeros: what is masked still takes part in a product, and 0 * nan is no 0.
    kept = prompts.new_zeros(shape)
    for part, places in in_ring(columns, size):
        first = part.start - columns[0]
        kept[:, :, places] = prompts[:, :, first : first + len(part)][rows]
    return kept


class FixedCache(Cache):
    """The cache of a batch of rows whose prompts have been read into a cache that grows.

    width: columns that have been written, of prompt and completion.
    """

    def __init__(self, grown: Cache, rows: Tensor, attention_mask: Tensor, tokens: int) -> None:
        """rows: [B], the prompt of each row; attention_mask: [P, L]; tokens: of the longest row, prompt included.

        The layers of `grown` are emptied one by one, so that the memory is not needed twice.
        """
        self.width = attention_mask.shape[1]
        self.device = rows.device
        self._shown = (0, 0)
        visible, slots = attention_mask[rows].bool(), whole_slots(tokens)
        self._rings: dict[int, Ring] = {}
        self.fixed: list[FixedLayer] = []
        # The types include layers of linear attention, which `covers` refuses.
        for layer in cast(list[Any], grown.layers):
            window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else slots
            size = min(window, slots)
            columns = range(self.width - min(layer.keys.shape[2], size), self.width)
            if size not in self._rings:
                self._rings[size] = Ring(size, columns, visible, layer.keys.dtype)
            self.fixed.append(FixedLayer(self._rings[size], rows, columns, layer))
            layer.keys = layer.values = None
        super().__init__(layers=list(self.fixed))

    @property
    def attended(self) -> bool:
        """Whether attention has read each layer once since the last call of `forget`."""
        return all(layer.attended == 1 for layer in self.fixed)

    def forget(self) -> None:
        for layer in self.fixed:
            layer.attended = 0

    def show(self, rows: int, tokens: int) -> int:
        """Let attention see the first rows, and slots for so many tokens: the number of slots."""
        slots = whole_slots(tokens)
        if self._shown != (rows, slots):
            self._shown = (rows, slots)
            for ring in self._rings.values():
                ring.show(rows, slots)
            for layer in self.fixed:
                layer.show(rows, min(slots, layer.ring.size))
        return slots

    def reveal(self) -> None:
        """Let attention see the tokens that are being written."""
        for ring in self._rings.values():
            ring.reveal()

    def advance(self) -> None:
        """The tokens have been written: go on to the next slot."""
        for ring in self._rings.values():
            ring.advance()

    def move(self, sources: Tensor, places: Tensor) -> None:
        """Copy the rows `sources` into the rows `places`, whose content is lost."""
        for ring in self._rings.values():
            ring.mask.index_copy_(0, places, ring.mask.index_select(0, sources))
        for layer in self.fixed:
            layer.move(sources, places, min(self.width, layer.ring.size))
