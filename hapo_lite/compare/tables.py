"""The tables of a comparison, as report.html and report.md show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hapo_lite.compare.numbers import MEASURES, Numbers
from hapo_lite.compare.words import COMPARED, shown, signed, verdict
from hapo_lite.train.intervals import Interval

SIGNS = {"better": "▲", "worse": "▼", "more": "△", "less": "▽"}


@dataclass(frozen=True)
class Cell:
    """A number of a table. below: lines in small print under the number; verdict: a key of SIGNS, or ""."""

    text: str
    below: tuple[str, ...] = ()
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """A table. heads: the heading of the arms, then those of the cells; rows: each an arm and its cells.

    caption: the text below the table, or "".
    """

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: str = ""


def final_table(numbers: Numbers) -> Table:
    """A row for each arm: every measure's mean over seeds and its interval."""
    rows = []
    for arm in numbers.arms:
        seeds, reached = len(numbers.seeds(arm)), numbers.reached(arm)
        cells = [Cell(str(seeds))]
        for name, measure in MEASURES.items():
            cell = _interval_cell(numbers.mean(arm, name), measure.unit)
            if name == "to_threshold" and reached < seeds and numbers.has_threshold:
                # A run that did not come up to the threshold counts with all its tokens: the mean is a lower bound.
                cell = Cell(f"≥ {cell.text}", (f"reached by {reached} of {seeds}",))
            cells.append(cell)
        rows.append((arm, cells))
    over_seeds = "Mean over seeds with its 95 % t interval"
    if len(numbers.comparison.seeds) == 1:
        over_seeds = "Values of one seed, which has no interval"
    threshold = f"not known before a run of {numbers.comparison.base} is complete"
    if numbers.has_threshold:
        threshold = f"{numbers.threshold:.3f}"
    meanings = "; ".join(f"{m.heading}: {m.meaning}" for m in MEASURES.values())
    return Table(
        ["arm", "seeds", *(m.heading for m in MEASURES.values())],
        rows,
        f"{over_seeds}. {meanings}. Threshold: {threshold}.",
    )


def difference_table(numbers: Numbers) -> Table:
    """A row for each arm but the reference: the arm less the reference in the measures of COMPARED."""
    rows = []
    for arm in numbers.others:
        cells = [Cell(str(len(numbers.pairs(arm, "final")[0])))]
        for name in COMPARED:
            unit = signed(MEASURES[name].unit)
            cell = _interval_cell(numbers.difference(arm, name), unit, verdict(numbers, arm, name))
            if name == "to_threshold" and not numbers.pairs_reached(arm):
                cell = Cell(cell.text, ("not reached by all",))
            cells.append(cell)
        rows.append((arm, cells))
    return Table(
        ["arm", "pairs", *(MEASURES[name].heading for name in COMPARED)],
        rows,
        f"Arm less {numbers.comparison.base}, {_paired(numbers)}",
    )


def _paired(numbers: Numbers) -> str:
    """How the differences are made, to follow what is compared."""
    if len(numbers.comparison.seeds) == 1:
        return "from one seed, which has no interval."
    return "paired by seed: mean with its 95 % t interval. Marked where the interval excludes 0."


def run_table(numbers: Numbers) -> Table:
    """A row for each complete run."""
    rows = []
    for (arm, seed), run in sorted(numbers.runs.items(), key=lambda item: numbers.arms.index(item[0][0])):
        values = {name: shown(run.measures[name], measure.unit) for name, measure in MEASURES.items()}
        if run.reach is None and numbers.has_threshold:
            values["to_threshold"] = "not reached"
        texts = [str(seed), f"{run.sampled:,}", str(run.iterations), f"{run.before:.3f}", *values.values()]
        rows.append((arm, [Cell(text) for text in texts]))
    heads = ["arm", "seed", "tokens", "iterations", "before", *(m.heading for m in MEASURES.values())]
    return Table(heads, rows)


def _interval_cell(interval: Interval | None, unit: str, verdict: str = "") -> Cell:
    if interval is None or math.isnan(interval.value):
        return Cell("-")
    if not interval.known:
        return Cell(shown(interval.value, unit), (), verdict)
    ends = f"{shown(interval.low, unit)} to {shown(interval.high, unit)}"
    return Cell(shown(interval.value, unit), (ends,), verdict)
