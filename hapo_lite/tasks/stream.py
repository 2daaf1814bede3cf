"""The training prompts in the order that a run takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from hapo_lite.errors import UserError
from hapo_lite.records import EncodedPrompt, Prompt
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
        taken: list[EncodedPrompt] = []
        position = start
        while len(taken) < count:
            prompt = self._at(position)
            if prompt is not None:
                taken.append(prompt)
            elif position - (taken[-1].index if taken else start) > 2 * len(self.prompts):
                raise UserError("every prompt of the training data is too long: raise data.max_prompt_tokens")
            position += 1
        return taken

    def _at(self, position: int) -> EncodedPrompt | None:
        epoch, place = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.prompts))
            self._epoch = epoch
        chosen = self.prompts[int(self._order[place])]
        return None if chosen is None else EncodedPrompt(position, chosen.prompt, chosen.ids)
