"""Runs one worst-case iteration of a recipe, and measures the peak memory and seconds of each stage.

The loop, the engine, the loss and the optimiser are those of a run. Prompts have the greatest length that the recipe
allows, no token ends a completion, and rewards alternate, so that every completion has a gradient.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from accelerate import Accelerator

from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe, RewardSettings
from hapo_lite.records import EncodedPrompt, Prompt, Score
from hapo_lite.rollout.engine import make_engine
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collector
from hapo_lite.train.loop import Loop
from hapo_lite.train.memory.predict import worst_case
from hapo_lite.train.memory.room import unpacks
from hapo_lite.train.observer import Observer

STAGES = ("rollout", "scoring", "update")
TICK_S = 0.004
"""Seconds between two readings of the process's resident memory, on a CPU."""


@dataclass(frozen=True)
class Measured:
    """Measurements by stage. allocated: bytes at the peak; on a CPU, the growth of the process since before the model.

    reserved: bytes of the card that torch held; None on a CPU. seconds: for one whole iteration of the recipe. fitted:
    settings that were halved until memory sufficed, and rollout.unpacked_base if a copy of the base was given up; empty
    if the recipe's own settings fitted.
    """

    allocated: dict[str, int]
    reserved: dict[str, int] | None
    seconds: dict[str, float]
    fitted: dict[str, int | str]


@dataclass(frozen=True)
class WorstCase:
    """A loop whose iterations need as much memory as the recipe's can. meter: measures its stages.

    share: the part of the recipe's iteration that one iteration of this loop does.
    """

    loop: Loop
    share: float
    meter: StageMeter


def prepare(recipe: Recipe) -> WorstCase:
    """Load the model and make its loop.

    An iteration has as many groups as fill a sampling batch and two micro-batches, at most the recipe's number of
    groups, and makes one update of them all.
    """
    accelerator = make_accelerator(recipe)
    meter = StageMeter(accelerator.device)
    unpacked = unpacks(recipe, accelerator.device)
    policy = load_policy(recipe.model, recipe.seed, accelerator.device, None, recipe.rollout.engine, unpacked)
    sizes = worst_case(recipe, policy.context)
    most = recipe.rollout.prompts_per_iteration
    rows = max(sizes.rows, 2 * sizes.batch)
    groups = min(most, math.ceil(rows / recipe.rollout.completions_per_prompt))
    loop = worst_loop(with_groups(recipe, groups), policy, accelerator, Progress(meter.enter))
    return WorstCase(loop, groups / most, meter)


def measure_loop(worst: WorstCase, say: Callable[[str], None]) -> Measured:
    """Run two iterations, the first as a warm-up. Peaks are those of both, seconds those of the second.

    Raises UserError if a stage was not reached, since a number before it was not finite.
    """
    loop, meter = worst.loop, worst.meter
    loop.watch(_SayShortage(say))
    state = TrainState()
    for _ in range(2):
        meter.seconds.clear()
        state = loop.step(state).state
        meter.enter("")
    missing = [stage for stage in STAGES if stage not in meter.allocated]
    if missing:
        raise UserError(
            f"the {missing[0]} could not be measured, since a number before it was not finite: see model.dtype"
        )
    fitted: dict[str, int | str] = {}
    oom = loop.resources.oom
    if loop.policy.dense is not None and loop.policy.dense.given_up:
        fitted["rollout.unpacked_base"] = "never"
    if oom.count:
        fitted["rollout.batch_size"] = loop.collector.engine.batch_size
        if oom.tokens:
            fitted["training.micro_batch_tokens"] = oom.tokens
    return Measured(
        {stage: meter.allocated[stage] for stage in STAGES},
        {stage: meter.reserved[stage] for stage in STAGES} if meter.cuda else None,
        {stage: meter.seconds[stage] / worst.share for stage in STAGES},
        fitted,
    )


def with_groups(recipe: Recipe, groups: int) -> Recipe:
    """The recipe with iterations of `groups` groups and one update, without traces and dynamic sampling.

    Completions are never left out for being cut off, as all of them are here, and rewards are those of its own scorer.
    """
    rollout = {"prompts_per_iteration": groups, "dynamic_sampling": False, "token_budget": None}
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update=rollout),
            "method": replace(recipe.method, truncated="keep"),
            "reward": RewardSettings(),
            "training": recipe.training.model_copy(update={"updates_per_iteration": 1}),
            "logging": recipe.logging.model_copy(update={"traces_per_iteration": 0}),
        }
    )


def worst_loop(recipe: Recipe, policy: Policy, accelerator: Accelerator, progress: Progress) -> Loop:
    """A loop over prompts and completions of the greatest length, each of which has a gradient."""
    sizes = worst_case(recipe, policy.context)
    text = policy.encode([{"role": "user", "content": "one two three four five six seven eight"}])
    repeated = text * math.ceil(sizes.prompt / len(text))
    ids = tuple(repeated[: sizes.prompt])
    groups = recipe.rollout.prompts_per_iteration
    prompts = [EncodedPrompt(i, Prompt(str(i), (("user", str(i)),), ""), ids) for i in range(groups)]
    endless = replace(policy, stop_ids=(-1,))
    engine = make_engine(recipe, endless, sizes.completion)
    collector = Collector(engine, _AlternatingScorer(progress), accelerator, progress)
    return Loop(recipe, policy, collector, PromptStream(prompts, recipe.seed))


class _SayShortage(Observer):
    """Prints a note when memory runs out."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_shortage(self, sentence: str, weights_unchanged: bool) -> None:
        self.say(f"note: {sentence}")


class _AlternatingScorer:
    """Grades completions as wrong and correct in turn."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        lengths: Sequence[int],
        truncated: Sequence[bool],
        iteration: int | None = None,
    ) -> list[Score]:
        wrong = Score(0.0, False, "wrong", None)
        correct = Score(1.0, True, "correct", None)
        return [correct if i % 2 else wrong for i in range(len(prompts))]


class StageMeter:
    """Measures peak memory and seconds of each stage. `enter` tells it which stage begins."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._began = 0.0
        self._peak = 0
        self._process = psutil.Process()
        self._before = 0 if self.cuda else self._process.memory_info().rss
        if not self.cuda:
            threading.Thread(target=self._follow_resident_memory, daemon=True).start()

    def enter(self, stage: str) -> None:
        """End the current stage and begin `stage`; "" begins none."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        if self._stage:
            self._record(time.perf_counter() - self._began)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            return_freed_memory()
            self._peak = self._process.memory_info().rss
        self._stage = stage
        self._began = time.perf_counter()

    def _record(self, seconds: float) -> None:
        """Add the current stage's seconds, and raise its peaks."""
        stage = self._stage
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        peak = torch.cuda.max_memory_allocated(self.device) if self.cuda else self._peak - self._before
        self.allocated[stage] = max(self.allocated.get(stage, 0), peak)
        if self.cuda:
            reserved = torch.cuda.max_memory_reserved(self.device)
            self.reserved[stage] = max(self.reserved.get(stage, 0), reserved)

    def _follow_resident_memory(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(TICK_S)


def return_freed_memory() -> None:
    """Make glibc return freed pages, so that one stage's peak is not counted in the next. Without glibc: no effect."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return
