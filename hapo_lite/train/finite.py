"""Numbers that are not finite, found before they reach an update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hapo_lite.records import Completion
from hapo_lite.tasks.rewards import Score


class NotFinite(Exception):
    """A number that is nan or inf, found before an update; the message says which."""


def check_rewards(scores: Sequence[Score], completions: Sequence[Completion]) -> None:
    """Raises NotFinite naming the first reward that is nan or inf."""
    for i, score in enumerate(scores):
        if not math.isfinite(score.reward):
            raise NotFinite(f"the reward of {describe(completions[i])} is {score.reward}")


def check_tokens(what: str, rows: Sequence[Tensor], completions: Sequence[Completion]) -> None:
    """Raises NotFinite naming the first token of which a number is nan or inf. rows: [T] of each completion."""
    for i, row in enumerate(rows):
        odd = (~torch.isfinite(row)).nonzero()
        if len(odd):
            place = int(odd[0])
            raise NotFinite(f"the {what} of token {place} of {describe(completions[i])} is {float(row[place])}")


def describe(completion: Completion) -> str:
    return f"completion {completion.sample} of prompt {completion.prompt.prompt.id}"
