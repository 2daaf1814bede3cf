"""The training prompts in the order that a run takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from hapo_lite.errors import UserError
from hapo_lite.records import EncodedPrompt, GroupResult, Prompt, Standing
from hapo_lite.tasks.store import digest_of, origin_of


class LazyPrompts(Sequence[EncodedPrompt | None]):
    """Prompts that are tokenised when they are read; a prompt of more than `most` tokens is read as None.

    digest: a hash of the prompts, their order, and the way they are tokenised. origin: as in sources.Table.
    """

    def __init__(self, prompts: Sequence[Prompt], encode: Callable[[Prompt], list[int]], most: int) -> None:
        self._prompts = prompts
        self._encode = encode
        self.most = most
        self.origin = origin_of(prompts)
        # The tokens of one prompt differ with another tokenizer or chat template.
        tokens = encode(prompts[0]) if len(prompts) else []
        self.digest = hashlib.sha256(f"{digest_of(prompts)} {most} {tokens}".encode()).hexdigest()

    @property
    def ids(self) -> list[str]:
        """The id of every prompt, in order."""
        return [prompt.id for prompt in self._prompts]

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> EncodedPrompt | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedPrompt | None]: ...
    def __getitem__(self, index: int | slice) -> EncodedPrompt | list[EncodedPrompt | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt = self._prompts[index]
        ids = self._encode(prompt)
        return EncodedPrompt(index, prompt, tuple(ids)) if len(ids) <= self.most else None


class PromptStream:
    """The training prompts without end: every epoch a new order, fixed by (seed, epoch).

    digest: a hash of all prompts. origin: as in sources.Table.

    A None among the prompts is left out. It keeps its position, so that the position of a run does not depend on which
    prompts were left out before.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt | None], seed: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        if isinstance(prompts, LazyPrompts):
            self.origin = prompts.origin
            self.digest = prompts.digest
        else:
            self.origin = ""
            self.digest = digest_of([p.prompt for p in prompts if p is not None])

    def take(self, start: int, count: int) -> list[EncodedPrompt]:
        """`count` prompts from position `start` on; each carries its position, which seeds its sampling.

        Raises UserError if a whole epoch has no prompt that is short enough.
        """
        return Draw(self, start).take(count)

    def draw(self, start: int, iteration: int, standings: Mapping[str, Standing]) -> Draw:
        """The prompts of one iteration, from position `start` on. standings: what the run knows of them, by id."""
        return Draw(self, start)

    def after(
        self, standings: Mapping[str, Standing], results: Sequence[GroupResult], iteration: int
    ) -> Mapping[str, Standing]:
        """What the run knows of its prompts after an iteration with these results."""
        return standings

    def place(self, position: int) -> int:
        """The place among the prompts that position `position` of the stream stands for."""
        epoch, place = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._order = self.order(epoch)
            self._epoch = epoch
        return int(self._order[place])

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The places of all prompts in the order of an epoch."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.prompts))


class Draw:
    """Prompts of a stream, taken one after another from a position on.

    used: positions passed so far. too_long: those of them whose prompt is too long. order: places of all prompts, which
    are taken in this order instead of the stream's. resting: places of prompts that are passed over, unless an epoch's
    length from where a `take` begins has too few others: they are then taken before any prompt is taken twice.
    """

    def __init__(
        self,
        stream: PromptStream,
        start: int,
        order: Sequence[int] | NDArray[np.int64] | None = None,
        resting: Collection[int] = (),
    ) -> None:
        self.stream = stream
        self.start = start
        self.order = order
        self.resting = resting
        self.used = 0
        self.too_long = 0

    def take(self, count: int) -> list[EncodedPrompt]:
        """The next `count` prompts; each carries its position. Raises UserError as `PromptStream.take` does."""
        taken: list[EncodedPrompt] = []
        asleep: list[int] = []
        size = len(self.stream.prompts)
        begin = self.used
        while len(taken) < count and self.used < begin + size:
            if self._place(self.used) in self.resting:
                asleep.append(self.used)
            else:
                self._add(taken, self.used)
            self.used += 1
        for offset in asleep[: count - len(taken)]:
            self._add(taken, offset)
        while len(taken) < count:
            latest = taken[-1].index - self.start if taken else begin
            if not self._add(taken, self.used) and self.used - latest > 2 * size:
                raise UserError("every prompt of the training data is too long: raise data.max_prompt_tokens")
            self.used += 1
        return sorted(taken, key=lambda prompt: prompt.index)

    def _place(self, offset: int) -> int:
        if self.order is None:
            return self.stream.place(self.start + offset)
        return int(self.order[offset % len(self.order)])

    def _add(self, taken: list[EncodedPrompt], offset: int) -> bool:
        """Add the prompt `offset` positions after the start to `taken`, unless it is too long."""
        prompt = self.stream.prompts[self._place(offset)]
        if prompt is None:
            self.too_long += 1
            return False
        taken.append(EncodedPrompt(self.start + offset, prompt.prompt, prompt.ids))
        return True
