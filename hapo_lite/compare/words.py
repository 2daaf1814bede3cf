"""The numbers of a comparison in sentences."""

from __future__ import annotations

import math

from hapo_lite.compare.numbers import MEASURES, Numbers
from hapo_lite.train.intervals import Interval

FALSE_ALARMS = {2: 0.49, 3: 0.26, 4: 0.19, 5: 0.17, 6: 0.16, 8: 0.12, 10: 0.11, 15: 0.08, 20: 0.06, 30: 0.06}
"""How often the interval of the difference of two equal methods excludes 0, by seeds (docs/compare.md)."""


def shown(value: float, unit: str) -> str:
    """A number as `unit` formats it, without a sign where it rounds to 0; "-" for NaN."""
    if math.isnan(value):
        return "-"
    text = f"{value:{unit}}"
    return text if any(digit in text for digit in "123456789") else text.lstrip("+-")


def spread(interval: Interval, unit: str) -> str:
    """An interval as text, such as 0.912 [0.890, 0.931]."""
    if math.isnan(interval.value):
        return "-"
    return f"{shown(interval.value, unit)} [{shown(interval.low, unit)}, {shown(interval.high, unit)}]"


def signed(unit: str) -> str:
    """The format `unit` with a sign for positive numbers too."""
    return f"+{unit}"


def verdict(numbers: Numbers, arm: str, measure: str) -> str:
    """ "better", "worse", "more" or "less"; "" where the interval of the difference includes 0."""
    found = numbers.difference(arm, measure)
    if found is None or not (found.above_zero or found.below_zero):
        return ""
    good = MEASURES[measure].good
    if not good:
        return "more" if found.above_zero else "less"
    return "better" if found.above_zero == (good > 0) else "worse"


def findings(numbers: Numbers) -> list[str]:
    """Sentences about the final accuracies and the areas."""
    comparison, base = numbers.comparison, numbers.comparison.base
    ranked = sorted(numbers.arms, key=lambda arm: -numbers.mean(arm, "final").value)
    ends = ", ".join(f"{arm} {numbers.mean(arm, 'final').value:.3f}" for arm in ranked)
    before = [run.before for run in numbers.runs.values()]
    said = [f"After {comparison.tokens:,} tokens, from {sum(before) / len(before):.3f} before: {ends}."]
    for measure, what in (("final", "final accuracy"), ("area", "area under the learning curve")):
        sorts: dict[str, list[str]] = {"better": [], "worse": [], "": []}
        for arm in numbers.others:
            found = numbers.difference(arm, measure)
            if found is not None:
                sorts[verdict(numbers, arm, measure)].append(f"{arm} ({shown(found.value, '+.3f')})")
        parts = [f"{kind} than {base}: {', '.join(sorts[kind])}" for kind in ("better", "worse") if sorts[kind]]
        if sorts[""]:
            parts.append(f"no difference seen: {', '.join(sorts[''])}")
        if parts:
            said.append(f"By {what}, {'; '.join(parts)}.")
    return said


def caveats(numbers: Numbers) -> list[str]:
    """Sentences about the limits of the intervals and of the comparison."""
    comparison = numbers.comparison
    pairs = [len(numbers.pairs(arm, "final")[0]) for arm in numbers.others]
    said = [_about_intervals(comparison.base, [count for count in pairs if count])]
    sampled = [run.sampled for run in numbers.runs.values()]
    over = max(sampled) / comparison.tokens - 1.0
    said.append(
        f"Equal tokens: every run ended with the iteration in which it had sampled {comparison.tokens:,} completion "
        f"tokens, discarded groups included; at most {100 * max(over, 0.0):.1f} % more were sampled. "
        "Same seed: same prompts in the same order, same held-out prompts, same random numbers of evaluation."
    )
    short = [f"{arm} with seed {seed}" for (arm, seed), run in numbers.runs.items() if run.sampled < comparison.tokens]
    if short:
        said.append(
            f"Ended by max_iterations before their tokens were sampled: {', '.join(short)}; their curves are held at "
            "the last value, and the comparison is not at equal tokens for them."
        )
    return said


def _about_intervals(base: str, pairs: list[int]) -> str:
    """How far the intervals can be believed. pairs: the number of pairs with the reference, by arm."""
    if not pairs:
        return f"There is no pair of runs to compare with {base} yet."
    fewest = min(pairs)
    if fewest < 2:
        return "One seed has no interval: repeat with five or more before believing a difference."
    alarms = FALSE_ALARMS[max(n for n in FALSE_ALARMS if n <= fewest)]
    expected = alarms * len(pairs)
    return (
        f"With {fewest} seeds a 95 % bootstrap interval is too narrow: that of two equal methods excludes 0 "
        f"in about {100 * alarms:.0f} % of cases. Of these {len(pairs)} comparisons about {expected:.1f} would "
        "do so by chance alone in each measure, so a lone mark is a hint and no proof."
    )
