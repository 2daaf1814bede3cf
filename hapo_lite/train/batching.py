"""Deals completions to optimiser steps and micro-batches, whose sizes need not divide one another.

The steps decide what is learned. The micro-batches decide how much memory it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

Parts = list[list[list[int]]]
"""The micro-batches of each part of an iteration, such as an optimiser step; members are places in its completions."""


@dataclass(frozen=True)
class Plan:
    """The division of an iteration's completions. members[u]: all completions of step u; updates[u]: its micro-batches.

    resting: micro-batches that are only scored, since completions without an advantage have no gradient.
    """

    members: list[list[int]]
    updates: Parts
    resting: list[list[int]]

    @property
    def parts(self) -> Parts:
        """The micro-batches of each step, then those that are only scored."""
        return [*self.updates, self.resting]

    def cut(self, parts: Parts) -> Plan:
        """The same plan with other micro-batches. parts: in the order of `Plan.parts`."""
        return replace(self, updates=parts[:-1], resting=parts[-1])


def make_plan(steps: Sequence[list[int]], lengths: Sequence[int], active: Collection[int], budget: int) -> Plan:
    """Cut each step into micro-batches of at most `budget` padded tokens.

    steps: from `deal_updates`. lengths: as in `micro_batches`. active: completions that have a gradient.
    """
    members = [step for step in steps if step]
    updates = [micro_batches([i for i in step if i in active], lengths, budget) for step in members]
    inactive = [i for i in range(len(lengths)) if i not in active]
    return Plan(members, updates, micro_batches(inactive, lengths, budget))


def deal_updates(count: int, updates: int, seed: int, iteration: int) -> list[list[int]]:
    """Shuffle `count` completions by (seed, iteration) and deal them to `updates` steps as evenly as possible."""
    order = np.random.default_rng((seed, iteration)).permutation(count)
    return [part.tolist() for part in np.array_split(order, updates)]


def micro_batches(members: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut `members` into micro-batches of at most `budget` padded tokens, the longest sequences together.

    lengths: tokens of each sequence, prompt included, indexed by member. A sequence longer than the budget stands
    alone.
    """
    batches: list[list[int]] = []
    width = 0
    for member in sorted(members, key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = lengths[member]
        batches[-1].append(member)
    return batches


def padded_tokens(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Number of tokens that the micro-batches compute, padding included. lengths: as in `micro_batches`."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
