"""From a stream of prompts to graded groups of completions, with DAPO's dynamic sampling as an option.

Axes: P prompts per iteration, G completions per prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from accelerate import Accelerator
from accelerate.utils import gather_object

from hapo_lite.records import Completion, EncodedPrompt, Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.engine import Engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.rewards import Score, Scorer
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.shortage import Shortage


@dataclass
class Collected:
    """Graded completions, group by group, and what it took to get them. seconds: per stage.

    prompts_used: positions of the stream, those that were left out as too long among them.
    """

    completions: list[Completion] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    prompts_used: int = 0
    groups_sampled: int = 0
    groups_equal: int = 0
    groups_discarded: int = 0
    tokens_sampled: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"rollout": 0.0, "grade": 0.0})


class Collector:
    """Samples, grades and gathers over all processes; every process ends up with the same groups.

    progress: told what begins and how far it is, here, in the engine, the scorer and the loop. shortage: what is done
    when memory runs out, here and in the loop.
    """

    def __init__(
        self,
        engine: Engine,
        scorer: Scorer,
        accelerator: Accelerator,
        progress: Progress | None = None,
    ) -> None:
        self.engine, self.scorer, self.accelerator = engine, scorer, accelerator
        self.progress = progress or Progress()
        for part in filter(None, (engine, scorer)):
            part.progress = self.progress
        self.shortage = Shortage(accelerator)

    def graded(
        self,
        prompts: Sequence[EncodedPrompt],
        samples: int,
        processor: AdaptiveTemperature,
        key: DrawKey,
        seconds: dict[str, float],
    ) -> tuple[list[Completion], list[Score]]:
        """`samples` completions of each prompt, in the prompts' order, whichever process wrote them."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        started = time.perf_counter()
        self.progress.enter("rollout" if key.stage == Stage.TRAINING else "evaluation")
        requests = [Request(prompt, sample) for prompt in prompts[rank::world] for sample in range(samples)]
        mine = self.shortage.fit_rollout(
            self.engine,
            -(-len(prompts) // world) * samples,  # the most that any process writes, as all halve together
            lambda: self.engine.sample(requests, processor, key),
            whole=key.stage == Stage.TRAINING,
        )
        rolled = time.perf_counter()
        self.progress.enter("grading")
        self.progress.count(len(mine), "answers")
        scores = self.scorer.score(
            [c.prompt.prompt for c in mine],
            [c.text for c in mine],
            [c.length for c in mine],
            [c.truncated for c in mine],
        )
        together = list(zip(mine, scores, strict=True))
        if world > 1:
            together = gather_object(together)
            place = {prompt.index: i for i, prompt in enumerate(prompts)}
            together.sort(key=lambda pair: (place[pair[0].prompt.index], pair[0].sample))
        seconds["rollout"] = seconds.get("rollout", 0.0) + rolled - started
        seconds["grade"] = seconds.get("grade", 0.0) + time.perf_counter() - rolled
        return [c for c, _ in together], [s for _, s in together]

    def collect(
        self,
        stream: PromptStream,
        cursor: int,
        groups: int,
        samples: int,
        processor: AdaptiveTemperature,
        seed: int,
        iteration: int,
        token_budget: int | None,
    ) -> Collected:
        """`groups` graded groups of `samples` completions, from position `cursor` of the stream on.

        token_budget: None takes the groups as they come. A number switches dynamic sampling on: groups whose rewards
        are all equal are dropped and others sampled, until there are enough or so many completion tokens have been
        sampled.
        """
        out = Collected()
        while (missing := groups - len(out.completions) // samples) > 0:
            prompts = stream.take(cursor + out.prompts_used, missing)
            kept = f"{groups - missing} of {groups} groups kept" if token_budget is not None else ""
            with self.progress.within(kept):
                key = DrawKey(seed, Stage.TRAINING, iteration)
                completions, scores = self.graded(prompts, samples, processor, key, out.seconds)
            out.prompts_used = prompts[-1].index + 1 - cursor
            out.groups_sampled += len(prompts)
            out.tokens_sampled += sum(c.length for c in completions)
            for start in range(0, len(completions), samples):
                group = slice(start, start + samples)
                equal = len({s.reward for s in scores[group]}) == 1
                out.groups_equal += equal
                if equal and token_budget is not None:
                    out.groups_discarded += 1
                else:
                    out.completions += completions[group]
                    out.scores += scores[group]
            if token_budget is None or out.tokens_sampled >= token_budget:
                break
        return out
