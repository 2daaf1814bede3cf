"""What the engines share: requests are worked through part by part, each with its random numbers fixed in advance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor

from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion
from hapo_lite.rollout.engine import Request
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import draws_of
from hapo_lite.runs.progress import Progress

WAVE = 8
"""Batches that an engine which refills its rows is given at once: bounds the memory of random numbers and records."""


class BatchedEngine:
    """An `Engine` but for how it writes one part. While it does, it tells `self.writing` what it knows at no cost."""

    def __init__(self, policy: Policy, batch_size: int, max_new_tokens: int) -> None:
        self.policy, self.batch_size, self.max_new_tokens = policy, batch_size, max_new_tokens
        self.progress = Progress()
        self.writing = self.progress.write(0, max_new_tokens)

    @classmethod
    def make(cls, recipe: Recipe, policy: Policy, max_new_tokens: int) -> Self:
        return cls(policy, recipe.rollout.batch_size, max_new_tokens)

    @property
    def part_size(self) -> int:
        """Requests that are handed to `_sample_part` together."""
        return self.batch_size

    def sample(
        self,
        requests: Sequence[Request],
        processor: AdaptiveTemperature,
        seed: int,
        stage: int,
        iteration: int,
        limit: int | None = None,
    ) -> list[Completion]:
        """As `Engine.sample` says."""
        completions: list[Completion] = []
        limit = limit or self.max_new_tokens
        self.writing = self.progress.write(len(requests), limit, refills=self.part_size > self.batch_size)
        with self.policy.unpacked():
            for start in range(0, len(requests), self.part_size):
                part = requests[start : start + self.part_size]
                self.writing.part(len(part), min(len(part), self.batch_size))
                draws = draws_of(part, seed, stage, iteration, limit)
                written = self._sample_part(part, processor, draws.to(self.policy.device))
                self.writing.part_ended(sum(c.length for c in written))
                completions += written
        return completions

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        """draws: [limit, B], the random numbers of each completion, on the policy's device."""
        raise NotImplementedError
