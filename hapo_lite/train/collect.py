"""Sampling and grading groups of completions for a stream of prompts, with DAPO's dynamic sampling as an option.

Axes: P prompts per iteration, G completions per prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object

from hapo_lite.records import Completion, EncodedPrompt, Graded, GroupResult, Prompt, Request, Score
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.engine import Engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.stream import Draw
from hapo_lite.train.oom_retry import OomRetry


class CompletionScorer(Protocol):
    """Scores completions, such as `hapo_lite.tasks.rewards.Scorer`. progress: told how many are graded."""

    progress: Progress

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        lengths: Sequence[int],
        truncated: Sequence[bool],
        iteration: int | None = None,
    ) -> list[Score]:
        """One Score per completion. lengths: in tokens. iteration: that of the training; None in an evaluation."""
        ...


@dataclass(frozen=True)
class GroupsWanted:
    """groups: number of groups; samples: completions per group; key: seeds their random numbers.

    token_budget: completion tokens after which dynamic sampling stops. Dynamic sampling drops groups whose rewards are
    all equal and samples others in their place. None: no dynamic sampling, every group is kept. compared: the named
    rewards that must each be equal for that; empty: the whole reward.
    """

    groups: int
    samples: int
    processor: AdaptiveTemperature
    key: DrawKey
    token_budget: int | None = None
    compared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """Graded completions in the order of their prompts, with the seconds that sampling and grading took."""

    graded: Graded
    rollout_seconds: float
    grade_seconds: float


@dataclass
class Collected:
    """Graded groups, and what sampling them cost. seconds: by stage.

    prompts_used: positions of the stream that were consumed. too_long: those of them whose prompt is too long. resting:
    prompts that rest in this iteration. results: of all groups that were sampled.
    """

    completions: list[Completion] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    results: list[GroupResult] = field(default_factory=list)
    prompts_used: int = 0
    too_long: int = 0
    resting: int = 0
    groups_sampled: int = 0
    groups_equal: int = 0
    groups_discarded: int = 0
    tokens_sampled: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "grade": 0.0})

    @property
    def graded(self) -> Graded:
        """The completions with their scores."""
        return Graded(self.completions, self.scores)

    def add(self, sampled: Sampled, wanted: GroupsWanted) -> None:
        """Count the sampled groups, and keep them; dynamic sampling discards those with equal rewards."""
        graded = sampled.graded
        samples = wanted.samples
        self.groups_sampled += len(graded) // samples
        self.tokens_sampled += sum(c.length for c in graded.completions)
        self.seconds["rollout"] += sampled.rollout_seconds
        self.seconds["grade"] += sampled.grade_seconds
        for start in range(0, len(graded), samples):
            group = graded.select(range(start, start + samples))
            right = sum(score.correct for score in group.scores)
            self.results.append(GroupResult(group.completions[0].prompt.prompt.id, right, samples))
            compared = {_compared(score, wanted.compared) for score in group.scores}
            # A group that is not finite is kept, so that the iteration is skipped with its reason.
            equal = len(compared) == 1 and all(map(math.isfinite, *compared))
            self.groups_equal += equal
            if equal and wanted.token_budget is not None:
                self.groups_discarded += 1
            else:
                self.completions += group.completions
                self.scores += group.scores


def _compared(score: Score, names: tuple[str, ...]) -> tuple[float, ...]:
    """The numbers of a completion that decide whether its group has anything to teach."""
    return tuple(score.rewards[name] for name in names) if names else (score.reward,)


class Collector:
    """Samples, grades and gathers over all processes; every process ends up with the same groups.

    progress: the stages report to it: this one, the engine, the scorer and the loop. oom: repeats work for which memory
    ran out; the loop uses the same object.
    """

    def __init__(
        self, engine: Engine, scorer: CompletionScorer, accelerator: Accelerator, progress: Progress | None = None
    ) -> None:
        self.engine = engine
        self.scorer = scorer
        self.accelerator = accelerator
        self.progress = progress or Progress()
        engine.progress = self.progress
        scorer.progress = self.progress
        self.oom = OomRetry(accelerator)

    def sample_and_grade(
        self, prompts: Sequence[EncodedPrompt], samples: int, processor: AdaptiveTemperature, key: DrawKey
    ) -> Sampled:
        """Sample and grade `samples` completions of each prompt. They come in the prompts' order on every process."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        training = key.stage == Stage.TRAINING
        started = time.perf_counter()
        self.progress.enter("rollout" if training else "evaluation")
        requests = [Request(prompt, sample) for prompt in prompts[rank::world] for sample in range(samples)]
        # The largest count of any process, so that all of them halve their batches together.
        largest_count = math.ceil(len(prompts) / world) * samples
        completions = self.oom.fit_rollout(
            self.engine,
            largest_count,
            lambda: self.engine.sample(requests, processor, key),
            weights_unchanged=training,
        )
        rolled = time.perf_counter()
        self.progress.enter("grading")
        self.progress.count(len(completions), "answers")
        scores = self.scorer.score(
            [c.prompt.prompt for c in completions],
            [c.text for c in completions],
            [c.length for c in completions],
            [c.truncated for c in completions],
            key.iteration if training else None,
        )
        pairs = list(zip(completions, scores, strict=True))
        if world > 1:
            pairs = gather_object(pairs)
            place = {prompt.index: i for i, prompt in enumerate(prompts)}
            pairs.sort(key=lambda pair: (place[pair[0].prompt.index], pair[0].sample))
        graded = Graded([completion for completion, _ in pairs], [score for _, score in pairs])
        return Sampled(graded, rolled - started, time.perf_counter() - rolled)

    def collect(self, draw: Draw, wanted: GroupsWanted) -> Collected:
        """Collect the wanted groups of the next prompts; fewer if the token budget is used up."""
        collected = Collected(resting=len(draw.resting))
        while (missing := wanted.groups - len(collected.completions) // wanted.samples) > 0:
            prompts = draw.take(missing)
            kept = ""
            if wanted.token_budget is not None:
                kept = f"{wanted.groups - missing} of {wanted.groups} groups kept"
            with self.progress.within(kept):
                sampled = self.sample_and_grade(prompts, wanted.samples, wanted.processor, wanted.key)
            collected.add(sampled, wanted)
            if wanted.token_budget is None or collected.tokens_sampled >= wanted.token_budget:
                break
        collected.prompts_used, collected.too_long = draw.used, draw.too_long
        return collected
