"""Next-token logits of rows that are being written, through a cache that is fixed or, for other models, one that grows.

Axes: P prompts, L tokens of a padded prompt, B rows, n rows that go on, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hapo_lite.model.decoder import call
from hapo_lite.records import put
from hapo_lite.rollout.attention import NotCovered, attending
from hapo_lite.rollout.cache import FixedCache
from hapo_lite.rollout.transcript import positions


class Forward(Protocol):
    """A model with the cache of its rows.

    keeps_its_place: whether the cache's memory stays where it is, so that a step can be recorded and replayed.
    """

    keeps_its_place: bool

    def reading(self) -> AbstractContextManager[None]:
        """A context within which `logits` may be called."""
        ...

    def prepare(self, rows: int) -> int:
        """Make ready for the next token of the first rows. Gives a number that stands for the shapes of the call."""
        ...

    def logits(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [n, V] of what follows `tokens`, [n], at the positions [n, 1]."""
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Row i is from here on what row order[i] was; other rows are given up."""
        ...


class FixedForward:
    """Through a `FixedCache`: shapes change only where `prepare` gives another number."""

    keeps_its_place = True

    def __init__(self, model: PreTrainedModel, cache: FixedCache) -> None:
        self.model, self.cache = model, cache

    def reading(self) -> AbstractContextManager[None]:
        return attending(self.model, self.cache)

    def check(self) -> None:
        """Raise NotCovered if the model does not write and read its cache as `logits` expects.

        What is written meanwhile is in the first row, in the slots that the next step overwrites.
        """
        self.cache.show(1, self.cache.width + 1)
        self.cache.forget()
        some = torch.zeros(1, dtype=torch.long, device=self.cache.device)
        with self.reading():
            self._model(some, some[:, None])
        if not self.cache.attended:
            raise NotCovered

    def prepare(self, rows: int) -> int:
        self.cache.width += 1
        return self.cache.show(rows, self.cache.width)

    def logits(self, tokens: Tensor, position: Tensor) -> Tensor:
        self.cache.reveal()
        logits = self._model(tokens, position)
        self.cache.advance()
        return logits

    def _model(self, tokens: Tensor, position: Tensor) -> Tensor:
        return _next_logits(self.model, self.cache, tokens[:, None], None, position)

    def keep(self, order: Sequence[int]) -> None:
        moved = [(row, place) for place, row in enumerate(order) if row != place]
        if moved:
            sources, places = put(torch.tensor(moved), self.cache.device).T
            self.cache.move(sources, places)


class GrowingForward:
    """Through the cache that transformers makes for the model, with a mask [n, tokens] that grows."""

    keeps_its_place = False

    def __init__(self, model: PreTrainedModel, cache: Cache, rows: Tensor, attention_mask: Tensor) -> None:
        """cache, attention_mask: of the prompts, P rows each; rows: [B], the prompt of each row."""
        self.model, self.cache = model, cache
        # Layers with a recurrent state have no `batch_select_indices`.
        cache.reorder_cache(cast(torch.LongTensor, rows))
        self.attention_mask = attention_mask[rows]

    def reading(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare(self, rows: int) -> int:
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(rows, 1)], dim=1)
        return self.attention_mask.shape[1]

    def logits(self, tokens: Tensor, position: Tensor) -> Tensor:
        return _next_logits(self.model, self.cache, tokens[:, None], self.attention_mask, position)

    def keep(self, order: Sequence[int]) -> None:
        kept = put(torch.tensor(order), self.attention_mask.device)
        self.cache.reorder_cache(cast(torch.LongTensor, kept))
        self.attention_mask = self.attention_mask[kept]


def read_prompts(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, cache: Cache) -> Tensor:
    """Read the prompts, [P, L], into an empty cache: logits [P, V] of the first tokens."""
    return _next_logits(model, cache, ids, attention_mask, positions(attention_mask))


def _next_logits(
    model: PreTrainedModel, cache: Cache, ids: Tensor, attention_mask: Tensor | None, position: Tensor
) -> Tensor:
    """Logits [rows, V] of what follows the last of `ids`."""
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "position_ids": position, "logits_to_keep": 1}
    return call(model, cache, **inputs).logits[:, -1]
