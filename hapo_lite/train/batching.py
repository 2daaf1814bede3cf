"""How completions are dealt to optimiser steps and micro-batches. Nothing has to divide anything.

The steps decide what is learned; the micro-batches only how much memory it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion

Parts = list[list[list[int]]]
"""Micro-batches, part by part, such as step by step: members of the iteration's completions."""


@dataclass(frozen=True)
class Plan:
    """Which completions go where: updates[u] are the micro-batches of step u, members[u] all its completions.

    `resting` are micro-batches that are only scored: completions without an advantage have no gradient to compute.
    """

    members: list[list[int]]
    updates: Parts
    resting: list[list[int]]

    @property
    def parts(self) -> Parts:
        return [*self.updates, self.resting]

    def cut(self, parts: Parts) -> Plan:
        """The same plan with other micro-batches, part by part."""
        return replace(self, updates=parts[:-1], resting=parts[-1])


def make_plan(recipe: Recipe, lengths: Sequence[int], active: set[int], iteration: int, budget: int) -> Plan:
    """Deal completions to steps, and steps to micro-batches. active: those that have a gradient to compute."""
    members = deal_updates(len(lengths), recipe.training.updates_per_iteration, recipe.seed, iteration)
    members = [part for part in members if part]
    updates = [micro_batches([i for i in part if i in active], lengths, budget) for part in members]
    return Plan(members, updates, micro_batches([i for i in range(len(lengths)) if i not in active], lengths, budget))


def deal_updates(count: int, updates: int, seed: int, iteration: int) -> list[list[int]]:
    """Shuffle `count` completions by (seed, iteration) and deal them to `updates` steps as evenly as can be."""
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


def sequence_lengths(completions: Sequence[Completion]) -> list[int]:
    """Tokens of each, prompt included."""
    return [len(c.prompt.ids) + c.length for c in completions]


def padded_tokens(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Tokens that micro-batches compute, padding included. lengths: as in `micro_batches`."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
