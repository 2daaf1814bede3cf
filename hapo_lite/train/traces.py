"""Which completions are traced, and what their traces say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.model.policy import Policy
from hapo_lite.records import Completion, Experience, Graded, Score, TokenOutcome
from hapo_lite.runs.trace import Trace


def choose_traced(graded: Graded, count: int) -> list[int]:
    """Completions to record: from the first groups on, of each group one that is correct and one that is not."""
    chosen: list[int] = []
    seen: set[tuple[int, bool]] = set()
    for i, (completion, score) in enumerate(zip(graded.completions, graded.scores, strict=True)):
        key = (completion.prompt.index, score.correct)
        if key not in seen and len(chosen) < count:
            seen.add(key)
            chosen.append(i)
    return chosen


@dataclass(frozen=True)
class Treatment:
    """What an iteration did to a completion. sampling_signal: it was sampled with; signal: of the iteration.

    outcome: of the update; None for a completion whose step was not taken.
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
    """Traces of the completions `traced`. outcomes: by completion."""
    return [
        make_trace(
            policy,
            "train",
            iteration,
            experience.completions[i],
            experience.scores[i],
            Treatment(sampling_signal, experience.signal, outcomes.get(i)),
        )
        for i in traced
    ]


def make_trace(
    policy: Policy,
    stage: str,
    iteration: int,
    completion: Completion,
    score: Score,
    training: Treatment | None = None,
) -> Trace:
    """Put one completion's record together. training: what the iteration did to it; None for an evaluation's."""
    treatment = training or Treatment()
    outcome = treatment.outcome
    ids = completion.ids.tolist()
    tokens: dict[str, list[Any]] = {
        "id": ids,
        "text": policy.tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=False),
        "logp_sampling": _short(completion.sampling_logp),
        "logp_base": _short(completion.base_logp),
        "entropy": _short(completion.entropy),
        "temperature": _short(completion.temperature),
    }
    if outcome is not None:
        tokens |= {
            "logp_old": _short(outcome.old_logp),
            "logp_new": _short(outcome.logp),
            "entropy": _short(outcome.entropy),
            "h": _short(outcome.h),
            "ratio": _short(outcome.ratio),
            "advantage": [_digits(outcome.advantage)] * len(ids),
            "credit": _short(outcome.credit),
            "lower": _short(outcome.lower),
            "upper": _short(outcome.upper),
            "clipped": [
                "low" if low else "high" if high else ""
                for low, high in zip(outcome.clipped_low.tolist(), outcome.clipped_high.tolist(), strict=True)
            ],
        }
        if outcome.kl_base is not None:
            tokens["kl_base"] = _short(outcome.kl_base)
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
    )


def _digits(value: float) -> float:
    return float(f"{value:.7g}")


def _short(values) -> list[float]:
    """Seven significant digits: all that fp32 holds, and small entropies keep theirs."""
    return [_digits(v) for v in values.tolist()]
