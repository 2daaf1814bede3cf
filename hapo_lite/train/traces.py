"""Which completions are traced, and what their traces say."""

from __future__ import annotations

from typing import Any

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.model.policy import Policy
from hapo_lite.records import Completion, TokenOutcome
from hapo_lite.runs.trace import Trace
from hapo_lite.tasks.rewards import Score
from hapo_lite.train.collect import Collected


def choose_traced(collected: Collected, count: int) -> list[int]:
    """Completions to record: from the first groups on, of each group one that is correct and one that is not."""
    chosen: list[int] = []
    seen: set[tuple[int, bool]] = set()
    for i, (completion, score) in enumerate(zip(collected.completions, collected.scores, strict=True)):
        key = (completion.prompt.index, score.correct)
        if key not in seen and len(chosen) < count:
            seen.add(key)
            chosen.append(i)
    return chosen


def make_trace(
    policy: Policy,
    stage: str,
    iteration: int,
    completion: Completion,
    score: Score,
    sampling_signal: EntropySignal | None,
    signal: EntropySignal | None = None,
    outcome: TokenOutcome | None = None,
) -> Trace:
    """Put one completion's record together; `outcome` is what the update did to it."""
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
        signal=signal,
        sampling_signal=sampling_signal,
    )


def _digits(value: float) -> float:
    return float(f"{value:.7g}")


def _short(values) -> list[float]:
    """Seven significant digits: all that fp32 holds, and small entropies keep theirs."""
    return [_digits(v) for v in values.tolist()]
