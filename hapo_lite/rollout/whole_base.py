"""Sampling with a base that FSDP has split: each process gathers the whole base once for each call."""

from __future__ import annotations

from collections.abc import Sequence

from hapo_lite.model.policy import Policy
from hapo_lite.model.sharding import whole_base
from hapo_lite.records import Completion, Request
from hapo_lite.rollout.draws import DrawKey
from hapo_lite.rollout.engine import Engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress


class WholeBaseEngine(Engine):
    """An engine that samples with the policy's own model while every process holds the whole base."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self.engine, self.policy = engine, policy

    @property
    def batch_size(self) -> int:
        return self.engine.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self.engine.batch_size = value

    @property
    def progress(self) -> Progress:
        return self.engine.progress

    @progress.setter
    def progress(self, value: Progress) -> None:
        self.engine.progress = value

    def sample(
        self,
        requests: Sequence[Request],
        processor: AdaptiveTemperature,
        key: DrawKey | int,
        *rest: int | None,
        limit: int | None = None,
    ) -> list[Completion]:
        """See `Engine.sample`."""
        with whole_base(self.policy):
            return self.engine.sample(requests, processor, key, *rest, limit=limit)
