"""The numbers of a comparison in sentences."""

from __future__ import annotations

import math

from hapo_lite.compare.numbers import CURVES, MEASURES, Numbers
from hapo_lite.train.intervals import LEVEL, Interval

JUDGED = {
    "final": "final accuracy",
    "area": "area under the learning curve",
    "solved": CURVES["solved"],
}
"""The measures by which arms are said to be better or worse, and what they are called in a sentence."""

COMPARED = (*JUDGED, "to_threshold", "length", "entropy")
"""Measures in the table of differences; differences.csv has all measures."""


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
    if not interval.known:
        return shown(interval.value, unit)
    return f"{shown(interval.value, unit)} [{shown(interval.low, unit)}, {shown(interval.high, unit)}]"


def signed(unit: str) -> str:
    """The format `unit` with a sign for positive numbers too."""
    return f"+{unit}"


def verdict(numbers: Numbers, arm: str, measure: str) -> str:
    """ "better", "worse", "more" or "less"; "" where the interval of the difference includes 0."""
    found = numbers.difference(arm, measure)
    if found is None or not found.excludes_zero:
        return ""
    good = MEASURES[measure].good
    if not good:
        return "more" if found.above_zero else "less"
    return "better" if found.above_zero == (good > 0) else "worse"


def findings(numbers: Numbers) -> list[str]:
    """Sentences about the final accuracies, the areas and the problems solved."""
    comparison, base = numbers.comparison, numbers.comparison.base
    ranked = sorted(numbers.arms, key=lambda arm: -numbers.mean(arm, "final").value)
    ends = ", ".join(f"{arm} {numbers.mean(arm, 'final').value:.3f}" for arm in ranked)
    before = [run.before for run in numbers.runs.values()]
    said = [f"After {comparison.tokens:,} tokens, from {sum(before) / len(before):.3f} before: {ends}."]
    if len({tuple(numbers.seeds(arm)) for arm in numbers.arms}) > 1:
        said[0] += " Arms differ in their seeds: read the differences, which are paired by seed, not these means."
    for measure, what in JUDGED.items():
        sorts: dict[str, list[str]] = {"better": [], "worse": [], "": [], "one seed": []}
        for arm in numbers.others:
            found = numbers.difference(arm, measure)
            if found is not None:
                kind = verdict(numbers, arm, measure) if found.known else "one seed"
                sorts[kind].append(f"{arm} ({shown(found.value, '+.3f')})")
        parts = [f"{kind} than {base}: {', '.join(sorts[kind])}" for kind in ("better", "worse") if sorts[kind]]
        if sorts[""]:
            parts.append(f"no difference seen: {', '.join(sorts[''])}")
        if sorts["one seed"]:
            parts.append(f"less {base}, from one seed, which has no interval: {', '.join(sorts['one seed'])}")
        if parts:
            said.append(f"By {what}, {'; '.join(parts)}.")
    return said


def caveats(numbers: Numbers) -> list[str]:
    """Sentences about the limits of the intervals and of the comparison."""
    comparison = numbers.comparison
    said = [_about_intervals(numbers)]
    sampled = [run.sampled for run in numbers.runs.values()]
    over = max(sampled) / comparison.tokens - 1.0
    order = "in an order that follows what each arm has solved" if numbers.remembers else "in the same order"
    said.append(
        f"Equal tokens: every run ended with the iteration in which it had sampled {comparison.tokens:,} completion "
        f"tokens, discarded groups included; at most {100 * max(over, 0.0):.1f} % more were sampled. "
        f"Same seed: same prompts {order}, same held-out prompts, same random numbers of evaluation."
    )
    short = [f"{arm} with seed {seed}" for (arm, seed), run in numbers.runs.items() if run.sampled < comparison.tokens]
    if short:
        said.append(
            f"Ended by max_iterations before their tokens were sampled: {', '.join(short)}; their curves are held at "
            "the last value, and the comparison is not at equal tokens for them."
        )
    if numbers.beyond:
        runs = ", ".join(f"{arm} with seed {seed}" for arm, seed in numbers.beyond)
        said.append(
            f"Left out, since they were trained for more tokens and not evaluated at {comparison.tokens:,}: {runs}."
        )
    return said


def _about_intervals(numbers: Numbers) -> str:
    """How far the intervals can be believed, and what is left of the marks when all comparisons are taken together."""
    base = numbers.comparison.base
    pairs = {arm: len(numbers.pairs(arm, "final")[0]) for arm in numbers.others}
    compared = [arm for arm, count in pairs.items() if count > 1]
    if not compared:
        if any(pairs.values()):
            return "One seed has no interval: repeat with three or more to see how far a difference can be believed."
        return f"There is no pair of runs to compare with {base} yet."
    count = len(compared)
    if count == 1:
        return (
            f"One comparison was made in each of {len(COMPARED)} measures: the interval of two equal methods excludes "
            f"0 in {1 - LEVEL:.0%} of cases, in each measure."
        )
    together = 1.0 - (1.0 - LEVEL) / count
    lasting = [
        f"{arm} ({MEASURES[measure].heading})"
        for measure in COMPARED
        for arm in compared
        if (found := numbers.difference(arm, measure, together)) and found.excludes_zero
    ]
    chance = count * (1.0 - LEVEL)
    return (
        f"{count} comparisons were made in each of {len(COMPARED)} measures; of so many equal methods about "
        f"{chance:.2g} would be marked in each by chance alone. With intervals that hold for all {count} together "
        f"(Bonferroni, each {together:.1%}) what stays marked is: {', '.join(lasting) or 'nothing'}."
    )
