"""The decoding loop: draw, record, look at what has ended, take rows out.

A step is a function of tensors alone. Its shapes change only where the number of rows or the slots of the cache go to
another bucket. What a step leaves behind lies in the transcript, and the host reads it every few steps.

Axes: B rows (completions being written), n rows that go on, V vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hapo_lite.records import put
from hapo_lite.rollout.forward import Forward
from hapo_lite.rollout.graphs import Graphs, Recorder
from hapo_lite.rollout.sampling import AdaptiveTemperature, Drawn, draw
from hapo_lite.rollout.transcript import Transcript

LOOK_EVERY = 8
"""Steps between two looks at what has ended, on a device that the host has to wait for. A row that has ended is written
on until then, and what follows its end is dropped."""


def looks_of(device: torch.device) -> int:
    """Steps between two looks: 1 on a CPU, where a look costs no wait."""
    return 1 if device.type == "cpu" else LOOK_EVERY


def bucket(count: int) -> int:
    """The number of rows that are computed for `count` rows that go on: four sizes an octave."""
    step = max(1, 2 ** (count.bit_length() - 3))
    return (count + step - 1) // step * step


@dataclass(frozen=True)
class Writing:
    """What the rows are written with.

    processor: of the logits; draws: [S, B], the random numbers; stop_ids: every token that ends a completion; wrote:
    called after each look with the number of rows that go on and the steps since the last look; record: see `Graphs`;
    drew: called at each step with the logits, [n, V], and what was drawn from them. It asks for record None, since a
    step that is replayed calls nothing.
    """

    processor: AdaptiveTemperature
    draws: Tensor
    stop_ids: Tensor
    wrote: Callable[[int, int], None] = lambda running, steps: None
    record: Recorder | None = None
    drew: Callable[[Tensor, Drawn], None] = lambda logits, drawn: None


class Rows:
    """The rows being written, in tensors whose first n entries are read; the rest belongs to rows that were taken out.

    request: [B], whose completion a row is; tokens: [B], the last one of each row; position: [B, 1], its position;
    step: [1], the number of the next token.
    """

    def __init__(self, position: Tensor) -> None:
        count, device = position.shape[0], position.device
        self.request = torch.arange(count, device=device)
        self.tokens = torch.zeros_like(self.request)
        self.position = position
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.ended = [False] * count

    @property
    def count(self) -> int:
        """n."""
        return len(self.ended)

    def order(self) -> list[int] | None:
        """The rows that are kept, if those that go on fit into a smaller bucket; else None.

        Rows that go on keep their place where they can, since a move copies a row of the cache.
        """
        count = bucket(self.ended.count(False))
        if count >= self.count:
            return None
        late = [row for row in range(count, self.count) if not self.ended[row]]
        return [row if not self.ended[row] or not late else late.pop() for row in range(count)]

    def keep(self, order: list[int]) -> None:
        kept = put(torch.tensor(order), self.tokens.device)
        for tensor in (self.request, self.tokens, self.position):
            tensor[: len(order)] = tensor[kept]
        self.ended = [self.ended[row] for row in order]


class Decoder:
    """Writes the rows of one batch. transcript: what has been written so far."""

    def __init__(self, writing: Writing, position: Tensor) -> None:
        """position: [B, 1], of the last token of each row's prompt."""
        self.writing, self.rows = writing, Rows(position)
        self.graphs = Graphs(writing.record)
        limit, count = writing.draws.shape
        self.transcript = Transcript(limit, count, position.device)
        self.look_every = looks_of(position.device)

    @torch.no_grad()
    def run(self, forward: Forward, logits: Tensor) -> None:
        """Write every row to its end. logits: [B, V], of the first tokens."""
        self.choose(self.rows.count, logits)
        del logits
        with forward.reading():
            for _ in self.steps(forward):
                pass

    def steps(self, forward: Forward) -> Iterator[int]:
        """Write every row to its end, after `choose` has written the first tokens. Stops for a moment after each look.

        Gives the number of tokens that each row has been given so far. Whoever asks for the next steps is within
        `forward.reading()` and without gradients.
        """
        seen, limit = 0, self.writing.draws.shape[0]
        for done in range(1, limit + 1):
            if done - seen == self.look_every or done == limit:
                self.look(seen, done)
                seen = done
                if all(self.rows.ended):
                    return
                self.take_out(forward)
                yield done
            if done < limit:
                self.step(forward)

    def step(self, forward: Forward) -> None:
        """One token more for every row."""
        count = self.rows.count
        width = forward.prepare(count)
        step = partial(self._step, forward, count)
        if forward.keeps_its_place:
            self.graphs.run((count, width), step)
        else:
            step()

    def _step(self, forward: Forward, count: int) -> None:
        self.choose(count, forward.logits(self.rows.tokens[:count], self.rows.position[:count]))

    def choose(self, count: int, logits: Tensor) -> None:
        """Draw and record a token for each of the first `count` rows. logits: [count, V]."""
        rows, request = self.rows, self.rows.request[:count]
        drawn = draw(self.writing.processor, logits, self.writing.draws[rows.step, request])
        self.transcript.write(rows.step, request, drawn)
        self.writing.drew(logits, drawn)
        rows.tokens[:count] = drawn.ids
        rows.position.add_(1)
        rows.step.add_(1)

    def look(self, seen: int, done: int) -> None:
        """Wait for the tokens from step `seen` up to `done`, and note which rows have ended."""
        rows = self.rows
        fresh = self.transcript.ids[seen:done, rows.request[: rows.count]]
        stopped = torch.isin(fresh, self.writing.stop_ids).any(dim=0).tolist()
        rows.ended = [before or now for before, now in zip(rows.ended, stopped, strict=True)]
        self.writing.wrote(rows.ended.count(False), done - seen)

    def take_out(self, forward: Forward) -> None:
        """Give up rows that have ended, down to the bucket of those that go on."""
        order = self.rows.order()
        if order is not None:
            self.rows.keep(order)
            forward.keep(order)
