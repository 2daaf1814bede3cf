"""How completions are dealt to optimiser steps and micro-batches. Nothing has to divide anything.

The steps decide what is learned; the micro-batches only how much memory it takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
