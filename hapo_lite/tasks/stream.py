"""The training prompts in the order that a run takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from hapo_lite.errors import UserError
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.tasks.store import digest_of, origin_of


class LazyPrompts(Sequence[EncodedPrompt | None]):
    """Prompts that are tokenised when they are asked for; None in place of one of more than `most` tokens.

    digest: changes with any prompt, their order, and the way they are tokenised. origin: as in sources.Table.
    """

    def __init__(self, prompts: Sequence[Prompt], encode: Callable[[Prompt], list[int]], most: int) -> None:
        self._prompts, self._encode, self.most = prompts, encode, most
        self.origin = origin_of(prompts)
        # The tokens of one prompt tell another tokenizer or chat template.
        tokens = encode(prompts[0]) if len(prompts) else []
        self.digest = hashlib.sha256(f"{digest_of(prompts)} {most} {tokens}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> EncodedPrompt | None:
        prompt = self._prompts[index]
        ids = self._encode(prompt)
        return EncodedPrompt(index, prompt, tuple(ids)) if len(ids) <= self.most else None


class PromptStream:
    """The training prompts without end: every epoch a new order, fixed by (seed, epoch).

    digest: of them all. origin: as in sources.Table.

    A None among the prompts is one to leave out. It keeps its position, so that where a run stands does not depend on
    which were left out before.
    """

    def __init__(self, prompts: Sequence[EncodedPrompt | None], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        lazy = isinstance(prompts, LazyPrompts)
        self.origin = prompts.origin if lazy else ""
        self.digest = prompts.digest if lazy else digest_of([p.prompt for p in prompts if p is not None])

    def take(self, start: int, count: int) -> list[EncodedPrompt]:
        """`count` prompts from position `start` on; each carries its position, which its sampling is seeded by.

        Raises UserError where a whole epoch has none.
        """
        taken: list[EncodedPrompt] = []
        position = start
        while len(taken) < count:
            if (prompt := self._at(position)) is not None:
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
