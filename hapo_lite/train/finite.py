"""Checks that find numbers that are not finite before they reach an update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hapo_lite.records import Completion, Graded


class NotFinite(Exception):
    """A number that is nan or inf, found before an update; the message says which."""


def check_rewards(graded: Graded) -> None:
    """Raises NotFinite naming the first reward that is nan or inf."""
    for completion, score in zip(graded.completions, graded.scores, strict=True):
        for name, value in score.rewards.items():
            if not math.isfinite(value):
                raise NotFinite(f"the reward {name} of {describe(completion)} is {value}")
        if not math.isfinite(score.reward):
            raise NotFinite(f"the reward of {describe(completion)} is {score.reward}")


def check_tokens(what: str, rows: Sequence[Tensor], completions: Sequence[Completion]) -> None:
    """Raises NotFinite naming the first token whose value is nan or inf. rows: [T] for each completion."""
    for row, completion in zip(rows, completions, strict=True):
        places = (~torch.isfinite(row)).nonzero()
        if len(places):
            first = int(places[0])
            raise NotFinite(f"the {what} of token {first} of {describe(completion)} is {float(row[first])}")


def describe(completion: Completion) -> str:
    """The completion's place in words."""
    return f"completion {completion.sample} of prompt {completion.prompt.prompt.id}"
