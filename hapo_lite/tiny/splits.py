"""How the problems of a built-in task are split into those of training and those that are held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Protocol, TypeVar


class HasPrompt(Protocol):
    """A problem of a built-in task."""

    @property
    def prompt(self) -> str: ...


P = TypeVar("P", bound=HasPrompt)


def held_out(problem: HasPrompt) -> bool:
    """Whether neither pretraining nor a run may see the problem: one in eight is held out, by the prompt's hash."""
    return hashlib.sha256(problem.prompt.encode()).digest()[0] < 32


def in_split(every: Iterable[P], split: str, seed: int) -> list[P]:
    """The "train" or the "test" problems, shuffled by `seed`. Raises ValueError for another split."""
    if split not in ("train", "test"):
        raise ValueError(f"the built-in task has the splits 'train' and 'test', not {split!r}")
    chosen = [problem for problem in every if held_out(problem) == (split == "test")]
    random.Random(seed).shuffle(chosen)
    return chosen
