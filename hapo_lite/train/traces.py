"""Chooses the completions that are traced, and puts their traces together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.model.policy import Policy
from hapo_lite.records import Completion, Experience, Graded, Score, TokenOutcome
from hapo_lite.runs.trace import Trace


def choose_traced(graded: Graded, count: int) -> list[int]:
    """Places of up to `count` completions to record, ascending.

    First come one that is correct and one that is not from each group. If there is room for more, the other completions
    follow, group by group.
    """
    first: list[int] = []
    others: list[int] = []
    seen: set[tuple[int, bool]] = set()
    for i, (completion, score) in enumerate(zip(graded.completions, graded.scores, strict=True)):
        key = (completion.prompt.index, score.correct)
        (others if key in seen else first).append(i)
        seen.add(key)
    return sorted([*first, *others][:count])


@dataclass(frozen=True)
class GroupCount:
    """The number of a group's completions, and of those that are correct."""

    size: int
    correct: int


def count_groups(completions: Sequence[Completion], scores: Sequence[Score]) -> dict[int, GroupCount]:
    """The counts of each group, by the index of its prompt."""
    sizes = Counter(completion.prompt.index for completion in completions)
    correct = Counter(c.prompt.index for c, score in zip(completions, scores, strict=True) if score.correct)
    return {index: GroupCount(size, correct[index]) for index, size in sizes.items()}


@dataclass(frozen=True)
class Treatment:
    """An iteration's effect on a completion. outcome: what the update did; None if its step was skipped.

    sampling_signal: the signal that set the temperatures. signal: the signal of the iteration's own completions.
    """

    sampling_signal: EntropySignal | None = None
    signal: EntropySignal | None = None
    outcome: TokenOutcome | None = None


def training_traces(
    policy: Policy,
    experience: Experience,
    outcomes: Mapping[int, TokenOutcome],
    traced: Sequence[int],
    iteration: int,
    sampling_signal: EntropySignal | None,
) -> list[Trace]:
    """Traces of the completions at the places `traced`. outcomes: by place."""
    groups = count_groups(experience.completions, experience.scores)
    traces = []
    for i in traced:
        completion = experience.completions[i]
        treatment = Treatment(sampling_signal, experience.signal, outcomes.get(i))
        trace = make_trace(policy, "train", iteration, completion, experience.scores[i], treatment)
        traces.append(of_group(trace, groups[completion.prompt.index]))
    return traces


def of_group(trace: Trace, group: GroupCount) -> Trace:
    """The trace with the counts of its group."""
    return replace(trace, group_size=group.size, group_correct=group.correct)


def make_trace(
    policy: Policy,
    stage: str,
    iteration: int,
    completion: Completion,
    score: Score,
    treatment: Treatment | None = None,
) -> Trace:
    """The trace of one completion. treatment: None for a completion of an evaluation."""
    if treatment is None:
        treatment = Treatment()
    tokens = _sampled_columns(policy, completion)
    if treatment.outcome is not None:
        tokens |= _update_columns(treatment.outcome)
    return Trace(
        stage=stage,
        iteration=iteration,
        prompt_id=completion.prompt.prompt.id,
        sample=completion.sample,
        messages=list(completion.prompt.prompt.messages),
        gold=completion.prompt.prompt.answer,
        text=completion.text,
        reward=score.reward,
        outcome=score.outcome,
        truncated=completion.truncated,
        tokens=tokens,
        signal=treatment.signal,
        sampling_signal=treatment.sampling_signal,
        rewards=score.rewards,
    )


def _sampled_columns(policy: Policy, completion: Completion) -> dict[str, list[Any]]:
    """The lists of a trace that every completion has."""
    ids = completion.ids.tolist()
    return {
        "id": ids,
        "text": policy.tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False),
        "logp_sampling": _rounded(completion.sampling_logp),
        "logp_base": _rounded(completion.base_logp),
        "entropy": _rounded(completion.entropy),
        "temperature": _rounded(completion.temperature),
    }


def _update_columns(outcome: TokenOutcome) -> dict[str, list[Any]]:
    """The lists of a trace that an update adds, the old policy's entropy in place of the sampler's."""
    clipped = [""] * len(outcome.ratio)
    for place in outcome.clipped_high.nonzero().flatten().tolist():
        clipped[place] = "high"
    for place in outcome.clipped_low.nonzero().flatten().tolist():
        clipped[place] = "low"
    columns: dict[str, list[Any]] = {
        "logp_old": _rounded(outcome.old_logp),
        "logp_new": _rounded(outcome.logp),
        "entropy": _rounded(outcome.entropy),
        "h": _rounded(outcome.h),
        "ratio": _rounded(outcome.ratio),
        "advantage": [_seven_digits(outcome.advantage)] * len(outcome.ratio),
        "credit": _rounded(outcome.credit),
        "clipped": clipped,
    }
    if bool(outcome.upper.isfinite().all()):  # A soft gate has no bounds, and JSON has no infinity.
        columns |= {"lower": _rounded(outcome.lower), "upper": _rounded(outcome.upper)}
    if outcome.measure is not None:
        columns["measure"] = _rounded(outcome.measure)
    if outcome.kl_base is not None:
        columns["kl_base"] = _rounded(outcome.kl_base)
    return columns


def _seven_digits(value: float) -> float:
    return float(f"{value:.7g}")


def _rounded(values: Tensor) -> list[float]:
    """The values with seven significant digits, which is fp32's precision, also for small entropies."""
    return [_seven_digits(v) for v in values.tolist()]
