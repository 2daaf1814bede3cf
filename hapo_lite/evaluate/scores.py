"""The numbers of an evaluation: avg@n, pass@k and maj@k with intervals, base against adapter.

Axes: P prompts, n samples of each. All functions are pure; the intervals come from hapo_lite.train.intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hapo_lite.evaluate.samples import Sample
from hapo_lite.tasks.verify import normal_form
from hapo_lite.train.intervals import Interval, avg_at_k, beyond_more_attempts, macro_interval, maj_at_k, pass_at_k
from hapo_lite.train.metrics import OUTCOMES
from hapo_lite.train.verdict import CUT_OFF, percent, signed

Values = Mapping[str, NDArray[np.float64]]
"""[P] values of each number that is reported: their mean is the number of the suite."""


def steps(n: int) -> list[int]:
    """The values of k in pass@k: 1, 2, 4, ... and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def by_prompt(samples: Sequence[Sample], n: int) -> dict[str, NDArray[np.float64]]:
    """[P] values, one for each prompt, of every number that is reported."""
    rows = [samples[i : i + n] for i in range(0, len(samples), n)]
    correct = np.array([[s.correct for s in row] for row in rows], dtype=np.float64)
    votes = [[None if s.answer is None else normal_form(s.answer) for s in row] for row in rows]
    return {
        f"avg@{n}": avg_at_k(correct),
        **{f"pass@{k}": pass_at_k(correct, k) for k in steps(n)},
        **{f"maj@{k}": maj_at_k(correct, votes, k) for k in steps(n) if k > 2 or k == n},
        "length": np.array([np.mean([s.length for s in row]) for row in rows]),
        "truncated": np.array([np.mean([s.truncated for s in row]) for row in rows]),
    }


def outcomes(samples: Sequence[Sample]) -> dict[str, int]:
    """The number of samples of each outcome."""
    counts = Counter(s.outcome for s in samples)
    return {name: counts[name] for name in OUTCOMES}


def intervals(suites: Sequence[Values], n: int) -> dict[str, Interval]:
    """The mean of each number over the suites, with its interval. All but the length are shares."""
    found = _means(suites, n)
    return {name: interval if name == "length" else interval.within(0.0, 1.0) for name, interval in found.items()}


def differences(base: Sequence[Values], adapter: Sequence[Values], n: int) -> dict[str, Interval]:
    """The mean of adapter - base on the same prompts over the suites, with its interval.

    "beyond" is how far the rise of pass@n exceeds what more attempts could have brought (`beyond_more_attempts`).
    """
    pairs = list(zip(base, adapter, strict=True))
    right = f"avg@{n}"
    beyond = [beyond_more_attempts(np.rint(n * b[right]), np.rint(n * a[right])) for b, a in pairs]
    change = _means([{name: a[name] - b[name] for name in b} for b, a in pairs], n)
    return change | {"beyond": macro_interval(beyond, step=1.0)}


def _means(suites: Sequence[Values], n: int) -> dict[str, Interval]:
    return {
        name: macro_interval([values[name] for values in suites], step=_smallest_difference(name, n))
        for name in suites[0]
    }


def _smallest_difference(name: str, n: int) -> float:
    """The least by which the values of two prompts differ: k / n for a share of k of n samples; 0 for the length."""
    if name == "length":
        return 0.0
    kind, _, k = name.partition("@")
    return int(k) / n if kind in ("pass", "maj") else 1.0 / n


def notes(arms: Mapping[str, Mapping[str, Interval]], max_new_tokens: int) -> list[str]:
    """Warnings about the numbers, each with the setting to change."""
    return [
        f"{label}: {percent(figures['truncated'].value)} of the completions were cut off at {max_new_tokens:,} tokens; "
        "raise benchmark.max_new_tokens to see what they would have answered"
        for label, figures in arms.items()
        if figures["truncated"].value >= CUT_OFF
    ]


def table(arms: Mapping[str, Mapping[str, Interval]], change: Mapping[str, Interval] | None, n: int) -> str:
    """The numbers as text, with a column for each model and one for the difference, if there is one."""
    names = [f"avg@{n}", *(f"pass@{k}" for k in steps(n)[1:])]
    if n > 1:
        names.append(f"maj@{n}")
    labels = {name: name for name in names} | {"length": "length, tokens", "truncated": "cut off at the limit"}
    rows = [["", *arms]]
    if change:
        rows[0].append("difference")
    for name, label in labels.items():
        digits = 1 if name == "length" else 3
        row = [label, *(_cell(figures[name], digits) for figures in arms.values())]
        if change:
            row.append(signed(change[name], digits))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cell(figure: Interval, digits: int) -> str:
    if not figure.known:
        return f"{figure.value:.{digits}f}"
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
