"""avg@n on the held-out prompts, at one temperature for all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hapo_lite.model.policy import Policy
from hapo_lite.recipe import EvaluationSettings
from hapo_lite.records import EncodedPrompt, Graded
from hapo_lite.rollout.draws import DrawKey
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.trace import Trace
from hapo_lite.train.collect import Collector
from hapo_lite.train.traces import count_groups, make_trace, of_group


@dataclass(frozen=True)
class HeldOut:
    """graded: `samples` completions per prompt. metrics: for metrics.jsonl. traces: records of a few completions."""

    graded: Graded
    samples: int
    metrics: dict[str, Any]
    traces: list[Trace] = field(default_factory=list)

    def with_traces(self, policy: Policy, iteration: int, count: int) -> HeldOut:
        """The same evaluation with traces of the first completion of the first `count` prompts."""
        graded = self.graded
        shown = range(0, len(graded), self.samples)[:count]
        groups = count_groups(graded.completions, graded.scores)
        traces = []
        for i in shown:
            completion = graded.completions[i]
            trace = make_trace(policy, "eval", iteration, completion, graded.scores[i])
            traces.append(of_group(trace, groups[completion.prompt.index]))
        return replace(self, traces=traces)


def evaluate_held_out(
    collector: Collector, prompts: Sequence[EncodedPrompt], settings: EvaluationSettings, key: DrawKey
) -> HeldOut:
    """Sample and grade every held-out prompt. key: seeds the random numbers."""
    processor = AdaptiveTemperature(None, settings.temperature)
    sampled = collector.sample_and_grade(prompts, settings.samples, processor, key)
    completions, scores = sampled.graded.completions, sampled.graded.scores
    count = len(scores)
    groups = [scores[start : start + settings.samples] for start in range(0, count, settings.samples)]
    metrics = {
        "eval/accuracy": sum(s.correct for s in scores) / count,
        "eval/solved": [sum(s.correct for s in group) for group in groups],
        "eval/length_mean": sum(c.length for c in completions) / count,
        "eval/truncated_share": sum(c.truncated for c in completions) / count,
        "eval/entropy_mean": float(torch.cat([c.entropy for c in completions]).mean()),
        "eval/unparseable_share": sum(s.outcome == "unparseable" for s in scores) / count,
        "seconds/evaluate": sampled.rollout_seconds + sampled.grade_seconds,
    }
    return HeldOut(sampled.graded, settings.samples, metrics)
