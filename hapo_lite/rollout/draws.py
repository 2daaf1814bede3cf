"""Random numbers that are fixed before sampling begins, so that a completion depends on neither batch nor schedule.

Axes: B requests, S steps (positions in a completion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from hapo_lite.records import Request


class Stage(IntEnum):
    """What completions are sampled for. Each stage has random numbers of its own."""

    TRAINING = 0
    EVALUATION = 1
    """The evaluations that training makes on its held-out prompts."""
    BENCHMARK = 2
    """`hapo_lite.evaluate`, and the benchmarks."""
    CANARY = 3
    """The check of the engine before training."""
    PROBE = 4
    """`hapo_lite.probe`."""
    FORK = 5
    """The inspector's continuations from one token of a completion."""
    SELECTION = 6
    """No completions: which tokens are trained, where a method draws them (`train/selection.py`)."""


@dataclass(frozen=True)
class DrawKey:
    """What the random numbers of one call of `Engine.sample` depend on, beside each request's prompt and sample.

    seed, stage, iteration: integers that are not negative; stage: a `Stage`.
    """

    seed: int
    stage: int
    iteration: int


def key_and_limit(key: DrawKey | int, rest: Sequence[int | None], limit: int | None) -> tuple[DrawKey, int | None]:
    """The key and the limit, from what `Engine.sample` was given.

    key: a `DrawKey`, or a seed; after a seed `rest` begins with stage and iteration. rest: may end with the limit.
    Raises TypeError if the arguments fit neither form.
    """
    if isinstance(key, DrawKey):
        found, after = key, rest
    else:
        stage, iteration, *after = rest if len(rest) > 1 else (None, None)
        if stage is None or iteration is None:
            raise TypeError("sample takes a DrawKey, or three numbers: seed, stage and iteration")
        found = DrawKey(key, stage, iteration)
    if len(after) > 1 or (after and limit is not None):
        raise TypeError("sample takes nothing but one limit after the DrawKey or its three numbers")
    return found, after[0] if after else limit


def uniforms(key: DrawKey, prompt: int, sample: int, count: int) -> Tensor:
    """The random numbers of one completion, one for each position: [count], fp64, in [0, 1).

    They depend on nothing but the arguments, so a completion does not depend on the batch that it is sampled in.
    prompt: `EncodedPrompt.index`; sample: the completion's number among those of its prompt.
    """
    entropy = (key.seed, int(key.stage), key.iteration, prompt, sample)
    return torch.from_numpy(np.random.default_rng(entropy).random(count))


def draws_of(requests: Sequence[Request], key: DrawKey, count: int) -> Tensor:
    """The random numbers of each request's completion: [count, B], fp64."""
    return torch.stack([uniforms(key, r.prompt.index, r.sample, count) for r in requests], dim=1)
