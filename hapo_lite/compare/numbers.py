"""The numbers of a comparison: curves over a common grid of tokens, a number per run and measure, paired differences.

Axes: S seeds, K points of the grid, which goes from 0 to the comparison's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hapo_lite.compare.arms import is_complete
from hapo_lite.compare.plan import Comparison, PlannedRun
from hapo_lite.runs.folder import RunFolder
from hapo_lite.train.intervals import LEVEL, Interval, mean_interval, paired_interval

Lines = Sequence[dict[str, Any]]

POINTS = 101
LATE = 0.9
"""Fraction of the tokens behind which the training entropy is averaged."""


@dataclass(frozen=True)
class Measure:
    """One number of a run. unit: its format, as in `format(value, unit)`.

    good: +1 where more is better, -1 where less is, 0 where neither is. share: whether it lies between 0 and 1.
    """

    heading: str
    meaning: str
    unit: str
    good: int = 0
    share: bool = False


MEASURES: dict[str, Measure] = {
    "final": Measure("final accuracy", "held-out accuracy at the end", ".3f", 1, share=True),
    "area": Measure("area", "held-out accuracy, mean over the tokens: area under the learning curve", ".3f", 1, True),
    "solved": Measure("pass@n", "share of the held-out problems that some attempt at the end solved", ".3f", 1, True),
    "to_threshold": Measure("tokens to threshold", "tokens until the held-out accuracy has come up to it", ",.0f", -1),
    "length": Measure("length", "held-out completion length at the end, tokens", ".1f"),
    "entropy": Measure("entropy", "training entropy over the last tenth of the tokens, nats", ".3f"),
    "clipped": Measure(
        "clipped", "share at a bound of the tokens with an advantage, mean over the tokens", ".2%", share=True
    ),
    "seconds": Measure("seconds", "wall time of training, without evaluations", ",.0f"),
}
CURVES: dict[str, str] = {
    "accuracy": "held-out accuracy",
    "solved": "held-out problems solved (pass@n)",
    "entropy": "training entropy, nats",
    "length": "completion length in training, tokens",
    "clipped": "share at a bound of the tokens with an advantage",
}
SHARES = ("accuracy", "solved", "clipped")
"""The curves that lie between 0 and 1."""


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of a complete run.

    before: accuracy before training. sampled: tokens at the end of the run. reach: tokens to the threshold, None if the
    accuracy did not reach it. curves: [K] by quantity.
    """

    before: float
    sampled: int
    iterations: int
    reach: float | None
    curves: dict[str, NDArray[np.float64]]
    measures: dict[str, float]


@dataclass(frozen=True)
class Band:
    """The mean over seeds and the interval around the mean, each [K]. One seed has no interval: its ends are NaN."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class Numbers:
    """The numbers of the complete runs of a comparison. runs: by arm and seed; grid: [K] tokens.

    threshold: NaN if it is to follow from runs of the reference, and none is complete. steps: the smallest difference
    between two values of a measure or curve, for those that count attempts. remembers: whether an arm's own results
    decide which prompts it sees next. beyond: runs, by arm and seed, that are left out since they were made for more
    tokens and have no evaluation at these.
    """

    comparison: Comparison
    runs: dict[tuple[str, int], RunNumbers]
    grid: NDArray[np.float64]
    threshold: float
    steps: Mapping[str, float] = field(default_factory=dict)
    remembers: bool = False
    beyond: tuple[tuple[str, int], ...] = ()
    _bands: dict[tuple[str, str, bool], Band] = field(default_factory=dict, compare=False, repr=False)

    def seeds(self, arm: str) -> list[int]:
        """Seeds with which the arm has a complete run."""
        return [seed for seed in self.comparison.seeds if (arm, seed) in self.runs]

    @property
    def has_threshold(self) -> bool:
        """Whether there is a threshold to reach."""
        return not math.isnan(self.threshold)

    @property
    def arms(self) -> list[str]:
        """Arms with a complete run, in the comparison's order."""
        return [arm for arm in self.comparison.arms if self.seeds(arm)]

    @property
    def others(self) -> list[str]:
        """Arms with a complete run, without the reference."""
        return [arm for arm in self.arms if arm != self.comparison.base]

    def values(self, arm: str, measure: str) -> list[float]:
        """The arm's values of a measure, one for each seed."""
        return [self.runs[arm, seed].measures[measure] for seed in self.seeds(arm)]

    def mean(self, arm: str, measure: str) -> Interval:
        """The mean over seeds with its interval; without one for tokens to a threshold that some seed did not reach."""
        found = _interval(self.values(arm, measure), self.steps.get(measure, 0.0))
        if measure == "to_threshold" and self.reached(arm) < len(self.seeds(arm)):
            return Interval(found.value, -math.inf, math.inf)
        return found.within(0.0, 1.0) if MEASURES[measure].share else found

    def pairs(self, arm: str, measure: str) -> tuple[list[float], list[float]]:
        """The reference's values and the arm's, for the seeds with which both have a complete run."""
        base = self.comparison.base
        seeds = [seed for seed in self.seeds(arm) if (base, seed) in self.runs]
        return (
            [self.runs[base, seed].measures[measure] for seed in seeds],
            [self.runs[arm, seed].measures[measure] for seed in seeds],
        )

    def difference(self, arm: str, measure: str, level: float = LEVEL) -> Interval | None:
        """The arm less the reference, paired by seed; None where there is no pair. level: as of `paired_interval`.

        Tokens to a threshold have no interval where one of the runs did not reach it: its tokens are not known.
        """
        before, after = self.pairs(arm, measure)
        if not before or not np.isfinite(before + after).all():
            return None
        if measure == "to_threshold" and not self.pairs_reached(arm):
            return Interval(float(np.mean(after) - np.mean(before)), -math.inf, math.inf)
        return paired_interval(before, after, level, self.steps.get(measure, 0.0))

    def reached(self, arm: str) -> int:
        """The number of seeds with which the accuracy reached the threshold, if there is one."""
        return sum(self.runs[arm, seed].reach is not None for seed in self.seeds(arm))

    def pairs_reached(self, arm: str) -> bool:
        """Whether every run of the arm's pairs reached the threshold; True where there is none."""
        base = self.comparison.base
        paired = [seed for seed in self.seeds(arm) if (base, seed) in self.runs]
        runs = [self.runs[each, seed] for each in (arm, base) for seed in paired]
        return not self.has_threshold or all(run.reach is not None for run in runs)

    def curves(self, arm: str, quantity: str, less_reference: bool = False) -> NDArray[np.float64]:
        """[S, K]: the arm's curves, or how much they lie above the reference's with the same seed."""
        base = self.comparison.base
        seeds = self.seeds(arm)
        if less_reference:
            seeds = [seed for seed in seeds if (base, seed) in self.runs]
        rows = np.array([self.runs[arm, seed].curves[quantity] for seed in seeds])
        if less_reference:
            rows = rows - np.array([self.runs[base, seed].curves[quantity] for seed in seeds])
        return rows.reshape(len(seeds), len(self.grid))

    def band(self, arm: str, quantity: str, less_reference: bool = False) -> Band:
        """The mean of `curves` and its interval. There must be at least one curve."""
        key = arm, quantity, less_reference
        if key not in self._bands:
            columns = self.curves(arm, quantity, less_reference).T
            points = [_interval(column, self.steps.get(quantity, 0.0)) for column in columns]
            if quantity in SHARES and not less_reference:
                points = [point.within(0.0, 1.0) for point in points]
            self._bands[key] = Band(
                mean=np.array([point.value for point in points]),
                low=np.array([point.low if point.known else np.nan for point in points]),
                high=np.array([point.high if point.known else np.nan for point in points]),
            )
        return self._bands[key]


def collect(comparison: Comparison, runs: Sequence[PlannedRun]) -> Numbers:
    """The numbers of every run that is complete, from its metrics."""
    grid = np.linspace(0.0, comparison.tokens, POINTS)
    lines = {(r.arm, r.seed): RunFolder(r.recipe.run_dir).metrics.read() for r in runs if is_complete(r)}
    beyond = tuple(key for key, its in lines.items() if not is_evaluated_at(its, comparison.tokens))
    lines = {key: its for key, its in lines.items() if key not in beyond}
    threshold = comparison.threshold or half_way(comparison, lines)
    found = {key: run_numbers(its, grid, threshold) for key, its in lines.items()}
    evaluation, data = runs[0].recipe.evaluation, runs[0].recipe.data
    attempt = 1.0 / (evaluation.prompts * evaluation.samples)
    steps = {"final": attempt, "area": attempt, "accuracy": attempt, "solved": attempt * evaluation.samples}
    return Numbers(comparison, found, grid, threshold, steps, data.remembers, beyond)


def evaluations(lines: Lines, budget: float) -> Lines:
    """The lines with an evaluation, up to the first one at `budget` tokens or more.

    A run may have sampled more tokens than the comparison asks for.
    """
    evaluated = [x for x in lines if "eval/accuracy" in x]
    within = sum(x.get("tokens", 0) < budget for x in evaluated)
    return evaluated[: within + 1]


def is_evaluated_at(lines: Lines, budget: float) -> bool:
    """Whether the run was evaluated after the first iteration that reached `budget` tokens. True if none did."""
    first = next((x["iteration"] for x in lines if x.get("tokens", 0) >= budget), None)
    return first is None or evaluations(lines, budget)[-1]["iteration"] == first


def run_numbers(lines: Lines, grid: NDArray[np.float64], threshold: float) -> RunNumbers:
    """The numbers of one run, from its lines of metrics up to the last tokens of `grid`.

    A quantity is interpolated between two lines. It stays at its last value for a run that max_iterations ended early.
    """
    budget = float(grid[-1])
    evaluated = [x | {"solved": solved_share(x)} for x in evaluations(lines, budget)]
    trained = [x | {"clipped": clipped_share(x)} for x in lines if "tokens" in x]
    accuracy = line_through(evaluated, "eval/accuracy", budget)
    entropy = line_through(trained, "entropy/all_mean", budget)
    clipped = line_through(trained, "clipped", budget)
    final = evaluated[-1]
    reach = first_reach(accuracy, threshold)
    return RunNumbers(
        before=evaluated[0]["eval/accuracy"],
        sampled=final.get("tokens", 0),
        iterations=final["iteration"],
        reach=reach,
        curves={
            "accuracy": np.interp(grid, *accuracy),
            "solved": np.interp(grid, *line_through(evaluated, "solved", budget)),
            "entropy": np.interp(grid, *entropy),
            "length": np.interp(grid, *line_through(trained, "length/mean", budget)),
            "clipped": np.interp(grid, *clipped),
        },
        measures={
            "final": final["eval/accuracy"],
            "area": mean_height(accuracy),
            "solved": final["solved"],
            "to_threshold": threshold if math.isnan(threshold) else budget if reach is None else reach,
            "length": final["eval/length_mean"],
            "entropy": mean_height(entropy, LATE * budget),
            "clipped": mean_height(clipped),
            "seconds": sum(x.get("seconds/iteration", 0.0) for x in trained if x["tokens"] <= final.get("tokens", 0)),
        },
    )


def line_through(lines: Lines, key: str, budget: float) -> NDArray[np.float64]:
    """[2, M]: tokens from 0 to exactly `budget`, and the value of a metric at each; NaN if no line has the metric."""
    found = [(x.get("tokens", 0), x[key]) for x in lines if key in x] or [(0, float("nan"))]
    tokens, values = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    inner = tokens[(tokens > 0) & (tokens < budget)]
    at = np.concatenate([[0.0], inner, [budget]])
    return np.stack([at, np.interp(at, tokens, values)])


def mean_height(line: NDArray[np.float64], start: float = 0.0) -> float:
    """Mean of a line over the tokens from `start` on: the area under the line divided by its width."""
    tokens, values = line
    at = np.concatenate([[start], tokens[tokens > start]])
    return float(np.trapezoid(np.interp(at, tokens, values), at) / (at[-1] - start))


def solved_share(line: dict[str, Any]) -> float:
    """Fraction of the held-out problems with at least one right attempt (pass@n); NaN for a line that has no counts."""
    counts = line.get("eval/solved")
    return sum(count > 0 for count in counts) / len(counts) if counts else float("nan")


def clipped_share(line: dict[str, Any]) -> float:
    """Fraction at either bound of the tokens with an advantage, whatever their entropy."""
    return sum(value for key, value in line.items() if key.startswith("clip/"))


def first_reach(line: NDArray[np.float64], threshold: float) -> float | None:
    """Tokens at which a line first reaches the threshold; None if it never does."""
    tokens, values = line
    above = np.flatnonzero(values >= threshold)
    if not above.size:
        return None
    i = int(above[0])
    if i == 0:
        return 0.0
    part = (threshold - values[i - 1]) / (values[i] - values[i - 1])
    return float(tokens[i - 1] + part * (tokens[i] - tokens[i - 1]))


def half_way(comparison: Comparison, lines: Mapping[tuple[str, int], Lines]) -> float:
    """The mean of the reference's accuracy before training and at the end, over its seeds; NaN without a run of it."""
    evaluated = [evaluations(its, comparison.tokens) for (arm, _), its in lines.items() if arm == comparison.base]
    ends = [[found[0]["eval/accuracy"], found[-1]["eval/accuracy"]] for found in evaluated]
    return float(np.mean(ends)) if ends else float("nan")


def _interval(values: Sequence[float] | NDArray[np.float64], step: float) -> Interval:
    """The t interval of a mean; NaN where a run lacks the number. step: as of `mean_interval`."""
    if np.isfinite(values).all():
        return mean_interval(values, step=step)
    nan = float("nan")
    return Interval(nan, nan, nan)
