"""Sampling with a base that FSDP has split: each process gathers it once."""

from __future__ import annotations

from collections.abc import Sequence

from hapo_lite.model.policy import Policy
from hapo_lite.model.sharding import whole_base
from hapo_lite.records import Completion
from hapo_lite.rollout.engine import Engine, Request
from hapo_lite.runs.progress import Progress


class WholeBaseEngine:
    """An engine that samples with the policy's own model, while every process has all of it."""

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

    def sample(self, requests: Sequence[Request], *arguments, **options) -> list[Completion]:
        with whole_base(self.policy):
            return self.engine.sample(requests, *arguments, **options)
