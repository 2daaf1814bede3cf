"""From a stream of prompts to graded groups of completions, with DAPO's dynamic sampling as an option.

Axes: P prompts per iteration, G completions per prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from accelerate import Accelerator
from accelerate.utils import gather_object

from hapo_lite.records import Completion, EncodedPrompt, Graded, Request, Score
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.engine import Engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.oom_retry import OomRetry


@dataclass(frozen=True)
class GroupsWanted:
    """groups: how many; samples: completions of each. key: of their random numbers.

    token_budget: None takes the groups as they come. A number switches dynamic sampling on: groups whose rewards are
    all equal are dropped and others sampled, until there are enough or so many completion tokens have been sampled.
    """

    groups: int
    samples: int
    processor: AdaptiveTemperature
    key: DrawKey
    token_budget: int | None = None


@dataclass(frozen=True)
class Sampled:
    """Graded completions in the order of their prompts. rollout_seconds, grade_seconds: what they took."""

    graded: Graded
    rollout_seconds: float
    grade_seconds: float


@dataclass
class Collected:
    """Graded groups, and what it took to get them. seconds: by stage.

    prompts_used: positions of the stream, including those that were left out as too long.
    """

    completions: list[Completion] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    prompts_used: int = 0
    groups_sampled: int = 0
    groups_equal: int = 0
    groups_discarded: int = 0
    tokens_sampled: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "grade": 0.0})

    @property
    def graded(self) -> Graded:
        return Graded(self.completions, self.scores)

    def add(self, sampled: Sampled, wanted: GroupsWanted) -> None:
        """Count what was sampled, and keep the groups that are wanted."""
        graded, samples = sampled.graded, wanted.samples
        self.groups_sampled += len(graded) // samples
        self.tokens_sampled += sum(c.length for c in graded.completions)
        self.seconds["rollout"] += sampled.rollout_seconds
        self.seconds["grade"] += sampled.grade_seconds
        for start in range(0, len(graded), samples):
            group = graded.select(range(start, start + samples))
            equal = len({score.reward for score in group.scores}) == 1
            self.groups_equal += equal
            if equal and wanted.token_budget is not None:
                self.groups_discarded += 1
            else:
                self.completions += group.completions
                self.scores += group.scores


class Collector:
    """Samples, grades and gathers over all processes; every process ends up with the same groups.

    progress: told what begins and how far it is, here, in the engine, the scorer and the loop. oom: what is done when
    memory runs out, here and in the loop.
    """

    def __init__(
        self, engine: Engine, scorer: Scorer, accelerator: Accelerator, progress: Progress | None = None
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
        """`samples` completions of each prompt, in the prompts' order, whichever process wrote them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        training = key.stage == Stage.TRAINING
        started = time.perf_counter()
        self.progress.enter("rollout" if training else "evaluation")
        requests = [Request(prompt, sample) for prompt in prompts[rank::world] for sample in range(samples)]
        most = math.ceil(len(prompts) / world) * samples  # that any process writes: all of them halve together
        completions = self.oom.fit_rollout(
            self.engine,
            most,
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
        )
        pairs = list(zip(completions, scores, strict=True))
        if world > 1:
            pairs = gather_object(pairs)
            place = {prompt.index: i for i, prompt in enumerate(prompts)}
            pairs.sort(key=lambda pair: (place[pair[0].prompt.index], pair[0].sample))
        graded = Graded([completion for completion, _ in pairs], [score for _, score in pairs])
        return Sampled(graded, rolled - started, time.perf_counter() - rolled)

    def collect(self, stream: PromptStream, cursor: int, wanted: GroupsWanted) -> Collected:
        """The groups that are wanted, from position `cursor` of the stream on; fewer where the token budget ends."""
        out = Collected()
        while (missing := wanted.groups - len(out.completions) // wanted.samples) > 0:
            prompts = stream.take(cursor + out.prompts_used, missing)
            kept = ""
            if wanted.token_budget is not None:
                kept = f"{wanted.groups - missing} of {wanted.groups} groups kept"
            with self.progress.within(kept):
                sampled = self.sample_and_grade(prompts, wanted.samples, wanted.processor, wanted.key)
            out.prompts_used = prompts[-1].index + 1 - cursor
            out.add(sampled, wanted)
            if wanted.token_budget is None or out.tokens_sampled >= wanted.token_budget:
                break
        return out
