"""The metrics of an iteration, each defined in docs/metrics.md.

Axes: B completions, N all completion tokens of the iteration, flattened.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hapo_lite.records import Completion, Experience, TokenOutcome
from hapo_lite.train.collect import Collected

OUTCOMES = ("correct", "wrong", "unparseable", "timeout", "error")
QUANTILES = (0.2, 0.5, 0.8, 0.95)


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Metrics of the kept completions (rewards, grades, lengths, temperatures) and of the sampled groups."""
    completions, scores = collected.completions, collected.scores
    rewards = torch.tensor([s.reward for s in scores], dtype=torch.float64)
    rewards = rewards[rewards.isfinite()]
    lengths = torch.tensor([c.length for c in completions], dtype=torch.float64)
    correct = torch.tensor([s.correct for s in scores], dtype=torch.bool)
    counts = Counter(s.outcome for s in scores)
    out = {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std(correction=0)) if len(rewards) else 0.0,
        "reward/correct_share": _mean(correct.double()),
        "length/mean": _mean(lengths),
        "length/max": float(lengths.max()) if len(lengths) else 0.0,
        "length/truncated_share": _mean(torch.tensor([c.truncated for c in completions], dtype=torch.float64)),
        "groups/sampled": collected.groups_sampled,
        "groups/equal_share": collected.groups_equal / max(collected.groups_sampled, 1),
        "groups/discarded": collected.groups_discarded,
        "groups/too_long": collected.too_long,
        "groups/resting": collected.resting,
    }
    for name in scores[0].rewards if scores else ():
        values = torch.tensor([s.rewards[name] for s in scores], dtype=torch.float64)
        out[f"reward/{name}"] = _mean(values[values.isfinite()])
    for name, chosen in (("correct", correct), ("wrong", ~correct)):
        if bool(chosen.any()):
            out[f"length/{name}_mean"] = _mean(lengths[chosen])
    out |= {f"grade/{name}_share": counts[name] / max(len(scores), 1) for name in OUTCOMES}
    temperatures = _flat([c.temperature for c in completions])
    if temperatures.numel():
        out |= {
            "temperature/min": float(temperatures.min()),
            "temperature/mean": _mean(temperatures),
            "temperature/max": float(temperatures.max()),
        }
    return out


def learning_metrics(experience: Experience, outcomes: Mapping[int, TokenOutcome]) -> dict[str, float]:
    """Metrics of the entropies, the updates, and the gap between sampler and trainer. outcomes: by completion."""
    return (
        entropy_metrics(experience)
        | update_metrics(list(outcomes.values()))
        | gap_metrics(experience.completions, experience.old_logp)
    )


def iteration_metrics(collected: Collected, clock: Stopwatch, device: torch.device) -> dict[str, float]:
    """Seconds by stage, sampled tokens per second, and peak memory."""
    seconds = {**clock.seconds, **collected.seconds}
    return {
        **{f"seconds/{stage}": value for stage, value in seconds.items()},
        "tokens_per_second/sampled": collected.tokens_sampled / max(collected.seconds["rollout"], 1e-9),
        "memory/peak_mb": peak_memory_mb(device),
    }


def entropy_metrics(experience: Experience) -> dict[str, float]:
    """Entropy of the old policy over all N tokens, and separately for correct and other completions; the signal."""
    out: dict[str, float] = {}
    signal = experience.signal
    graded = list(zip(experience.entropy, experience.scores, strict=True))
    correct = [e for e, s in graded if s.correct]
    wrong = [e for e, s in graded if not s.correct]
    for name, rows in (("all", experience.entropy), ("correct", correct), ("wrong", wrong)):
        values = _flat(rows)
        if values.numel():
            out[f"entropy/{name}_mean"] = _mean(values)
            levels = torch.quantile(_thinned(values), torch.tensor(QUANTILES, dtype=torch.float64))
            out |= {f"entropy/{name}_q{round(100 * q)}": float(v) for q, v in zip(QUANTILES, levels, strict=True)}
    return out | {
        "signal/pivot": signal.pivot,
        "signal/sigma": signal.sigma,
        "signal/high": signal.high,
        "signal/low": signal.low,
        "signal/above_share": _mean(_flat(experience.uncertain)),
    }


def update_metrics(outcomes: Sequence[TokenOutcome]) -> dict[str, float]:
    """Divergence from the base over all tokens; ratios, clipping and credit over completions with an advantage.

    Both are over the tokens that the updates computed.
    """
    outcomes = [o.of_computed() for o in outcomes]
    divergence = _base_divergence(outcomes)
    live = [o for o in outcomes if o.advantage != 0.0]
    ratio = _flat([o.ratio for o in live])
    if not ratio.numel():
        return divergence
    uncertain = _flat([o.uncertain for o in live]).bool()
    low = _flat([o.clipped_low for o in live]).bool()
    high = _flat([o.clipped_high for o in live]).bool()
    before = torch.cat([torch.full_like(o.credit, o.advantage, dtype=torch.float64) for o in live])
    credit = _flat([o.credit for o in live])
    change = credit.abs() - before.abs()
    count = ratio.numel()
    trained = torch.cat([o.trained for o in live])
    # Of the log-probabilities, since a ratio may be 0 by rounding.
    fall = _flat([o.old_logp for o in live]) - _flat([o.logp for o in live])
    # A redistributed token differs by a factor 1 + h; rounding alone stays far below this.
    moved = 1e-6 * before.abs()
    return divergence | {
        "ratio/mean": _mean(ratio),
        "ratio/min": float(ratio.min()),
        "ratio/max": float(ratio.max()),
        "ratio/kl_old": _mean(ratio - 1.0 + fall),
        "clip/low_certain_share": float((low & ~uncertain).sum()) / count,
        "clip/low_uncertain_share": float((low & uncertain).sum()) / count,
        "clip/high_certain_share": float((high & ~uncertain).sum()) / count,
        "clip/high_uncertain_share": float((high & uncertain).sum()) / count,
        "credit/amplified_share": float((change > moved).sum()) / count,
        "credit/suppressed_share": float((change < -moved).sum()) / count,
        # From what the method trains, since a token's redistributed credit may be 0 on one CPU and tiny on another.
        "credit/zero_share": float((~trained).sum()) / count,
    }


def _base_divergence(outcomes: Sequence[TokenOutcome]) -> dict[str, float]:
    """Mean divergence from the base model over certain and over uncertain tokens; empty for a method without it."""
    measured = [(o.kl_base, o.uncertain) for o in outcomes if o.kl_base is not None]
    certain = _flat([kl[~uncertain] for kl, uncertain in measured])
    uncertain = _flat([kl[uncertain] for kl, uncertain in measured])
    means = {}
    if certain.numel():
        means["kl_base/certain_mean"] = _mean(certain)
    if uncertain.numel():
        means["kl_base/uncertain_mean"] = _mean(uncertain)
    return means


def gap_metrics(completions: Sequence[Completion], old_logp: Sequence[Tensor]) -> dict[str, float]:
    """Absolute difference of the sampler's and the trainer's log-probabilities, at the base temperature."""
    gap = (_flat([c.base_logp for c in completions]) - _flat(list(old_logp))).abs()
    return {"sampler/gap_mean": _mean(gap), "sampler/gap_max": float(gap.max())}


class Stopwatch:
    """Measures the seconds of each stage of an iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap, or since the start, as `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MiB: of the tensors on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _flat(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.double() for row in rows]) if rows else torch.empty(0, dtype=torch.float64)


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0


def _thinned(values: Tensor, limit: int = 1_000_000) -> Tensor:
    """Every k-th value, at most `limit` of them, since torch.quantile refuses more than 16 million."""
    return values[:: max(1, math.ceil(values.numel() / limit))]
