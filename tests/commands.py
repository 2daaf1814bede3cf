"""Commands in processes of their own and in this one, and overrides that make a run small."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from accelerate.state import AcceleratorState

from tests.conftest import ROOT

# One thread and no spinning: the suite may share its cores, and sums are in one order.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
SMALL = [
    "rollout.prompts_per_iteration=4",
    "rollout.completions_per_prompt=4",
    "rollout.old_logprobs=recomputed",
    "training.iterations=6",
    "training.updates_per_iteration=2",
    "evaluation.prompts=4",
    "evaluation.samples=2",
    "evaluation.every=3",
    "checkpoint.every=2",
    "reward.workers=1",
    "logging.traces_per_iteration=2",
]
RUN_FILES = {
    "recipe.yaml",
    "status.json",
    "metrics.jsonl",
    "traces",
    "checkpoints",
    "adapter",
    "summary.json",
    "curves.png",
}
"""The content of a finished run's folder."""


@contextlib.contextmanager
def own_precision() -> Iterator[None]:
    """For a command in this process: accelerate settles on one precision for all of a process's life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
