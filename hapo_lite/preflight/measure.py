"""One iteration of a recipe at its worst, for real: peak memory and seconds of each stage.

The loop, the engine, the loss and the optimiser are those of a run. Prompts have the length that the recipe allows,
no token ends a completion, and rewards alternate, so that every completion has a gradient.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.rollout.engine import make_engine
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.rewards import Score
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collector
from hapo_lite.train.loop import Loop
from hapo_lite.train.memory.predict import worst_case
from hapo_lite.train.memory.room import unpacks

STAGES = ("rollout", "scoring", "update")
TICK = 0.004
"""Seconds between two looks at the resident memory of a process on a CPU."""


@dataclass(frozen=True)
class Measured:
    """By stage. allocated: bytes at the peak, of tensors on a GPU, of the process beyond what it had before the model
    on a CPU; reserved: what torch held of the card; None on a CPU. seconds: of one whole iteration. fitted: settings
    that memory had to be halved to; empty if all went as the recipe says.
    """

    allocated: dict[str, int]
    reserved: dict[str, int] | None
    seconds: dict[str, float]
    fitted: dict[str, int]


@dataclass(frozen=True)
class Worst:
    """loop: whose iterations are the recipe's at their worst; share: how much of one each does."""

    loop: Loop
    share: float
    watch: Watch


def prepare(recipe: Recipe) -> Worst:
    """Load the model and make its loop."""
    accelerator = make_accelerator(recipe)
    watch = Watch(accelerator.device)
    unpacked = unpacks(recipe, accelerator.device)
    policy = load_policy(recipe.model, recipe.seed, accelerator.device, None, recipe.rollout.engine, unpacked)
    loop, share = worst_loop(recipe, policy, accelerator, Progress(watch.enter))
    return Worst(loop, share, watch)


def measure_loop(worst: Worst, say: Callable[[str], None]) -> Measured:
    """Run two iterations: the first warms up; peaks are of both, seconds of the second."""
    loop, share, watch = worst.loop, worst.share, worst.watch
    loop.shortage.tell = lambda sentence, whole: say(f"note: {sentence}")
    state = TrainState()
    for _ in range(2):
        watch.seconds.clear()
        state, _, _ = loop.step(state)
        watch.enter("")
    if missing := [stage for stage in STAGES if stage not in watch.allocated]:
        raise UserError(
            f"the {missing[0]} could not be measured, since a number before it was not finite: see model.dtype"
        )
    fitted = {}
    if loop.shortage.count:
        fitted = {"rollout.batch_size": loop.collector.engine.batch_size}
        if loop.shortage.tokens:
            fitted["training.micro_batch_tokens"] = loop.shortage.tokens
    return Measured(
        {stage: watch.allocated[stage] for stage in STAGES},
        {stage: watch.reserved[stage] for stage in STAGES} if watch.cuda else None,
        {stage: watch.seconds[stage] / share for stage in STAGES},
        fitted,
    )


def worst_loop(recipe: Recipe, policy: Policy, accelerator, progress: Progress) -> tuple[Loop, float]:
    """A loop whose iterations are the recipe's at their worst, and what share of one each does.

    As many groups as fill a sampling batch and two micro-batches, at most the recipe's, and one update of them all.
    """
    sizes, rollout = worst_case(recipe, policy.context), recipe.rollout
    samples = rollout.completions_per_prompt
    groups = min(rollout.prompts_per_iteration, -(-max(sizes.rows, 2 * sizes.batch) // samples))
    small = recipe.model_copy(
        update={
            "rollout": rollout.model_copy(
                update={"prompts_per_iteration": groups, "dynamic_sampling": False, "token_budget": None}
            ),
            "training": recipe.training.model_copy(update={"updates_per_iteration": 1}),
            "logging": recipe.logging.model_copy(update={"traces_per_iteration": 0}),
        }
    )
    some = policy.encode([{"role": "user", "content": "one two three four five six seven eight"}])
    ids = tuple((some * -(-sizes.prompt // len(some)))[: sizes.prompt])
    prompts = [EncodedPrompt(i, Prompt(str(i), (("user", str(i)),), ""), ids) for i in range(groups)]
    endless = replace(policy, stop_ids=(-1,))
    engine = make_engine(small, endless, sizes.completion)
    collector = Collector(engine, _Turns(), accelerator, progress)
    loop = Loop(small, policy, collector, PromptStream(prompts, recipe.seed), (), accelerator)
    return loop, groups / rollout.prompts_per_iteration


class _Turns:
    """Grades in turn right and wrong."""

    def score(self, prompts: Sequence[Prompt], *_) -> list[Score]:
        return [Score(float(i % 2), bool(i % 2), "correct" if i % 2 else "wrong", None) for i in range(len(prompts))]


class Watch:
    """Peaks and seconds by stage; told which one begins."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage, self._began, self._peak = "", 0.0, 0
        self._process = psutil.Process()
        self._before = 0 if self.cuda else self._process.memory_info().rss
        if not self.cuda:
            threading.Thread(target=self._look, daemon=True).start()

    def enter(self, stage: str) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._began
            peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else self._peak - self._before
            self.allocated[self._stage] = max(self.allocated.get(self._stage, 0), peak)
            if self.cuda:
                reserved = torch.cuda.max_memory_reserved(self.device)
                self.reserved[self._stage] = max(self.reserved.get(self._stage, 0), reserved)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            return_freed_memory()
            self._peak = self._process.memory_info().rss
        self._stage, self._began = stage, time.perf_counter()

    def _look(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(TICK)


def return_freed_memory() -> None:
    """Have glibc hand freed pages back, so that one stage's peak is not counted in the next; elsewhere a no-op."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return
