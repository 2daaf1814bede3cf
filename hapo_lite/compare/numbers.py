"""The runs of a comparison -> curves over a common grid of tokens, a number per run and measure, paired differences.

Axes: S seeds, K points of the grid, which goes from 0 to the comparison's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hapo_lite.compare.arms import is_complete
from hapo_lite.compare.plan import Comparison, PlannedRun
from hapo_lite.runs.folder import RunFolder
from hapo_lite.train.intervals import Interval, bootstrap_interval, paired_interval

Lines = Sequence[dict[str, Any]]

POINTS = 101
BAND_RESAMPLES = 1000
"""Of the bootstrap at each point of a curve; the tables take the default."""
LATE = 0.9
"""Entropy and length in training are those of the tokens from here on."""


@dataclass(frozen=True)
class Measure:
    """One number of a run. unit: how it is written, as in `format(value, unit)`; good: +1 more, -1 less, 0 neither."""

    heading: str
    meaning: str
    unit: str
    good: int = 0


MEASURES: dict[str, Measure] = {
    "final": Measure("final accuracy", "held-out accuracy at the end", ".3f", 1),
    "area": Measure("area", "held-out accuracy, mean over the tokens: area under the learning curve", ".3f", 1),
    "to_threshold": Measure("tokens to threshold", "tokens until the held-out accuracy has come up to it", ",.0f", -1),
    "length": Measure("length", "held-out completion length at the end, tokens", ".1f"),
    "entropy": Measure("entropy", "training entropy over the last tenth of the tokens, nats", ".3f"),
    "clipped": Measure("clipped", "share of tokens stopped by clipping, mean over the tokens", ".2%"),
    "seconds": Measure("seconds", "wall time of training, without evaluations", ",.0f"),
}
CURVES: dict[str, str] = {
    "accuracy": "held-out accuracy",
    "entropy": "training entropy, nats",
    "length": "completion length in training, tokens",
    "clipped": "share of tokens stopped by clipping",
}


@dataclass(frozen=True)
class RunNumbers:
    """A complete run.

    before: accuracy before training. sampled: tokens at its end. reach: tokens to the threshold, None if it was not
    reached. curves: [K] by quantity.
    """

    before: float
    sampled: int
    iterations: int
    reach: float | None
    curves: dict[str, NDArray[np.float64]]
    measures: dict[str, float]


@dataclass(frozen=True)
class Band:
    """Mean over seeds and the interval about it, each [K]."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class Numbers:
    """What the complete runs of a comparison say. runs: by arm and seed; grid: [K] tokens."""

    comparison: Comparison
    runs: dict[tuple[str, int], RunNumbers]
    grid: NDArray[np.float64]
    threshold: float
    _bands: dict[tuple[str, str, bool], Band] = field(default_factory=dict, compare=False, repr=False)

    def seeds(self, arm: str) -> list[int]:
        """Seeds with which the arm is complete."""
        return [seed for seed in self.comparison.seeds if (arm, seed) in self.runs]

    @property
    def arms(self) -> list[str]:
        """Arms with a complete run, in the comparison's order."""
        return [arm for arm in self.comparison.arms if self.seeds(arm)]

    @property
    def others(self) -> list[str]:
        """Arms with a complete run, but for the reference."""
        return [arm for arm in self.arms if arm != self.comparison.base]

    def values(self, arm: str, measure: str) -> list[float]:
        return [self.runs[arm, seed].measures[measure] for seed in self.seeds(arm)]

    def mean(self, arm: str, measure: str) -> Interval:
        return _interval(self.values(arm, measure))

    def pairs(self, arm: str, measure: str) -> tuple[list[float], list[float]]:
        """The reference's values and the arm's, of the seeds with which both are complete."""
        base = self.comparison.base
        seeds = [seed for seed in self.seeds(arm) if (base, seed) in self.runs]
        return (
            [self.runs[base, seed].measures[measure] for seed in seeds],
            [self.runs[arm, seed].measures[measure] for seed in seeds],
        )

    def difference(self, arm: str, measure: str) -> Interval | None:
        """The arm less the reference, paired by seed; None where there is no pair."""
        before, after = self.pairs(arm, measure)
        return paired_interval(before, after) if before and np.isfinite(before + after).all() else None

    def reached(self, arm: str) -> int:
        """Of how many seeds the accuracy came up to the threshold."""
        return sum(self.runs[arm, seed].reach is not None for seed in self.seeds(arm))

    def curves(self, arm: str, quantity: str, less_reference: bool = False) -> NDArray[np.float64]:
        """[S, K]: the arm's curves, or how much they lie above the reference's with the same seed."""
        base = self.comparison.base
        seeds = [s for s in self.seeds(arm) if not less_reference or (base, s) in self.runs]
        rows = [
            self.runs[arm, s].curves[quantity] - (self.runs[base, s].curves[quantity] if less_reference else 0.0)
            for s in seeds
        ]
        return np.array(rows).reshape(len(seeds), len(self.grid))

    def band(self, arm: str, quantity: str, less_reference: bool = False) -> Band:
        """Of those curves, of which there is at least one."""
        key = arm, quantity, less_reference
        if key not in self._bands:
            columns = self.curves(arm, quantity, less_reference).T
            points = [_interval(column, resamples=BAND_RESAMPLES) for column in columns]
            self._bands[key] = Band(*(np.array([getattr(p, n) for p in points]) for n in ("value", "low", "high")))
        return self._bands[key]


def collect(comparison: Comparison, runs: Sequence[PlannedRun]) -> Numbers:
    """The numbers of every run that is complete."""
    grid = np.linspace(0.0, comparison.tokens, POINTS)
    lines = {(r.arm, r.seed): RunFolder(r.recipe.run_dir).metrics.read() for r in runs if is_complete(r)}
    threshold = comparison.threshold or half_way(comparison, lines)
    return Numbers(comparison, {key: run_numbers(its, grid, threshold) for key, its in lines.items()}, grid, threshold)


def run_numbers(lines: Lines, grid: NDArray[np.float64], threshold: float) -> RunNumbers:
    """One run's lines of metrics, from no token to the last of `grid`.

    Between two lines a quantity is interpolated; after the last it stays, for a run that max_iterations ended early.
    """
    budget = float(grid[-1])
    evaluated = [x for x in lines if "eval/accuracy" in x]
    trained = [x | {"clipped": clipped_share(x)} for x in lines if "tokens" in x]
    accuracy = line_through(evaluated, "eval/accuracy", budget)
    entropy = line_through(trained, "entropy/all_mean", budget)
    clipped = line_through(trained, "clipped", budget)
    # The end is the first evaluation with all the tokens: a run may have been made for more of them.
    final = next((x for x in evaluated if x.get("tokens", 0) >= budget), evaluated[-1])
    reach = first_reach(accuracy, threshold)
    return RunNumbers(
        before=evaluated[0]["eval/accuracy"],
        sampled=final.get("tokens", 0),
        iterations=final["iteration"],
        reach=reach,
        curves={
            "accuracy": np.interp(grid, *accuracy),
            "entropy": np.interp(grid, *entropy),
            "length": np.interp(grid, *line_through(trained, "length/mean", budget)),
            "clipped": np.interp(grid, *clipped),
        },
        measures={
            "final": final["eval/accuracy"],
            "area": mean_height(accuracy),
            "to_threshold": budget if reach is None else reach,
            "length": final["eval/length_mean"],
            "entropy": mean_height(entropy, LATE * budget),
            "clipped": mean_height(clipped),
            "seconds": sum(x.get("seconds/iteration", 0.0) for x in trained if x["tokens"] <= final.get("tokens", 0)),
        },
    )


def line_through(lines: Lines, key: str, budget: float) -> NDArray[np.float64]:
    """[2, M]: tokens, from 0 to `budget` exactly, and a metric at them; NaN if no line has it."""
    found = [(x.get("tokens", 0), x[key]) for x in lines if key in x] or [(0, float("nan"))]
    tokens, values = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    inner = tokens[(tokens > 0) & (tokens < budget)]
    at = np.concatenate([[0.0], inner, [budget]])
    return np.stack([at, np.interp(at, tokens, values)])


def mean_height(line: NDArray[np.float64], start: float = 0.0) -> float:
    """Mean of a line over the tokens from `start` on: the area under it, by the width."""
    tokens, values = line
    at = np.concatenate([[start], tokens[tokens > start]])
    return float(np.trapezoid(np.interp(at, tokens, values), at) / (at[-1] - start))


def clipped_share(line: dict[str, Any]) -> float:
    """Tokens stopped at either bound, whatever their entropy."""
    return sum(value for key, value in line.items() if key.startswith("clip/"))


def first_reach(line: NDArray[np.float64], threshold: float) -> float | None:
    """Tokens at which a line first comes up to the threshold; None if it never does."""
    tokens, values = line
    above = np.flatnonzero(values >= threshold)
    if not above.size:
        return None
    i = int(above[0])
    if i == 0:
        return 0.0
    part = (threshold - values[i - 1]) / (values[i] - values[i - 1])
    return float(tokens[i - 1] + part * (tokens[i] - tokens[i - 1]))


def half_way(comparison: Comparison, lines: dict[tuple[str, int], Lines]) -> float:
    """Half-way from the accuracy before training to the reference's at the end, means over its seeds."""
    evaluated = [
        [x["eval/accuracy"] for x in its if "eval/accuracy" in x]
        for (arm, _), its in lines.items()
        if arm == comparison.base
    ]
    return float(np.mean([[found[0], found[-1]] for found in evaluated])) if evaluated else float("nan")


def _interval(values: Sequence[float] | NDArray[np.float64], **options: int) -> Interval:
    """The bootstrap's, or NaN where a run has no such number."""
    return bootstrap_interval(values, **options) if np.isfinite(values).all() else Interval(*[float("nan")] * 3)
