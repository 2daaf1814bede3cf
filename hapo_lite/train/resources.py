"""The objects that every stage of an iteration uses besides its settings."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from hapo_lite.runs.progress import Progress
from hapo_lite.train.oom_retry import OomRetry
from hapo_lite.train.processes import Processes


@dataclass(frozen=True)
class Resources:
    """accelerator: device and precision. oom: repeats work for which memory ran out. progress: stages report to it."""

    accelerator: Accelerator
    processes: Processes
    oom: OomRetry
    progress: Progress
