"""What the engines share: requests are sampled part by part, with random numbers that are fixed before.

Axes: B requests of a part.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from torch import Tensor

from hapo_lite.model.policy import Policy
from hapo_lite.model.refusals import own_errors
from hapo_lite.model.sharding import whole_base
from hapo_lite.records import Completion, Request, put
from hapo_lite.rollout.draws import DrawKey, draws_of, key_and_limit
from hapo_lite.rollout.engine import Engine, EngineSettings
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress

WAVE = 8
"""Batches in a part, for an engine that refills its rows. A limit bounds the memory of random numbers and records."""


class BatchedEngine(Engine):
    """An engine without its decoding: a subclass writes `_sample_part`, and reports its steps to `self.writing`."""

    def __init__(self, policy: Policy, batch_size: int, max_new_tokens: int) -> None:
        self.policy = policy
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.progress = Progress()
        self.writing = self.progress.write(0, max_new_tokens)
        self.has_run = False

    @classmethod
    def make(cls, settings: EngineSettings, policy: Policy) -> Self:
        return cls(policy, settings.rollout.batch_size, settings.max_new_tokens)

    @property
    def part_size(self) -> int:
        """Requests that are passed to `_sample_part` together."""
        return self.batch_size

    def sample(
        self,
        requests: Sequence[Request],
        processor: AdaptiveTemperature,
        key: DrawKey | int,
        *rest: int | None,
        limit: int | None = None,
    ) -> list[Completion]:
        """See `Engine.sample`."""
        draw_key, given_limit = key_and_limit(key, rest, limit)
        longest = given_limit or self.max_new_tokens
        completions: list[Completion] = []
        with self._ready():
            self.writing = self.progress.write(len(requests), longest, refills=self.part_size > self.batch_size)
            for start in range(0, len(requests), self.part_size):
                part = requests[start : start + self.part_size]
                self.writing.part(len(part), min(len(part), self.batch_size))
                draws = draws_of(part, draw_key, longest)
                # A model that has written a batch can run; an error after that is a fault to be traced.
                with contextlib.nullcontext() if self.has_run else self._first_run():
                    written = self._sample_part(part, processor, put(draws, self.policy.device))
                self.has_run = True
                self.writing.part_ended(sum(c.length for c in written))
                completions += written
        return completions

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """A context within which the engine can sample: a base that FSDP has split is whole in each process."""
        with whole_base(self.policy), self.policy.unpacked():
            yield

    def _first_run(self) -> contextlib.AbstractContextManager[None]:
        return own_errors(str(self.policy.base.name_or_path), self.policy.dense is not None)

    @abstractmethod
    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        """One completion for each request. draws: [limit, B], the random numbers, on the policy's device."""
