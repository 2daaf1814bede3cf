"""The report of a comparison: pages, PNG figures and CSV numbers beside the runs, a table on the terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hapo_lite.compare.figures import DrawnPicture, drawn, pictures
from hapo_lite.compare.markdown import markdown
from hapo_lite.compare.numbers import CURVES, MEASURES, Numbers, collect
from hapo_lite.compare.page import page
from hapo_lite.compare.plan import Comparison, PlannedRun
from hapo_lite.compare.words import spread
from hapo_lite.errors import writing


def write_report(comparison: Comparison, runs: Sequence[PlannedRun], failed: dict[str, str]) -> None:
    """Report on the complete runs. failed: a sentence for each run that failed, by name."""
    numbers = collect(comparison, runs)
    if not numbers.runs:
        print("no run is complete yet: there is nothing to report on")
        return
    folder = comparison.folder
    missing = _missing(numbers, runs, failed)
    figures: list[DrawnPicture] = [drawn(picture, numbers) for picture in pictures(numbers)]
    with writing(folder):
        for figure in figures:
            (folder / f"{figure.picture.name}.png").write_bytes(figure.light)
        _write_csv(folder / "table.csv", table_rows(numbers))
        _write_csv(folder / "differences.csv", difference_rows(numbers))
        _write_csv(folder / "runs.csv", run_rows(numbers))
        _write_csv(folder / "curves.csv", curve_rows(numbers))
        (folder / "report.html").write_text(page(numbers, len(runs), missing, figures), encoding="utf-8")
        (folder / "report.md").write_text(markdown(numbers, len(runs), missing), encoding="utf-8")
    print(text_table(numbers))
    print(f"{folder}: report.html, report.md, table.csv, differences.csv, runs.csv, curves.csv, and the figures as PNG")


def table_rows(numbers: Numbers) -> Iterable[dict[str, Any]]:
    """A row for each arm: every measure's mean over seeds and its 95 % interval."""
    for arm in numbers.arms:
        row: dict[str, Any] = {"arm": arm, "seeds": len(numbers.seeds(arm)), "reached_threshold": numbers.reached(arm)}
        for measure in MEASURES:
            found = numbers.mean(arm, measure)
            ends = found.as_json()
            row |= {measure: found.value, f"{measure}_low": ends["low"], f"{measure}_high": ends["high"]}
        yield row


def difference_rows(numbers: Numbers) -> Iterable[dict[str, Any]]:
    """A row for each arm and measure: the arm less the reference, paired by seed, with its 95 % interval."""
    for arm in numbers.others:
        for measure in MEASURES:
            found = numbers.difference(arm, measure)
            if found is not None:
                ends = found.as_json()
                yield {
                    "arm": arm,
                    "reference": numbers.comparison.base,
                    "measure": measure,
                    "pairs": len(numbers.pairs(arm, measure)[0]),
                    "difference": found.value,
                    "low": ends["low"],
                    "high": ends["high"],
                    "excludes_zero": found.excludes_zero,
                }


def run_rows(numbers: Numbers) -> Iterable[dict[str, Any]]:
    """A row for each complete run."""
    for (arm, seed), run in numbers.runs.items():
        yield {
            "arm": arm,
            "seed": seed,
            "tokens": run.sampled,
            "iterations": run.iterations,
            "before": run.before,
            "reached_threshold": run.reach is not None,
            **run.measures,
        }


def curve_rows(numbers: Numbers) -> Iterable[dict[str, Any]]:
    """A row for each curve, arm and point of the grid: the mean over seeds and its 95 % interval, if it has one."""
    for quantity in CURVES:
        for arm in numbers.arms:
            band = numbers.band(arm, quantity)
            for tokens, mean, low, high in zip(numbers.grid, band.mean, band.low, band.high, strict=True):
                ends = {"low": None, "high": None} if math.isnan(low) else {"low": low, "high": high}
                yield {"curve": quantity, "arm": arm, "tokens": tokens, "mean": mean, **ends}


def text_table(numbers: Numbers) -> str:
    """The final table for a terminal."""
    base = numbers.comparison.base
    measures = ("final", "area")
    rows = [["arm", "seeds", "final accuracy", "area", f"final less {base}'s", f"area less {base}'s"]]
    for arm in numbers.arms:
        means = [spread(numbers.mean(arm, measure), ".3f") for measure in measures]
        differences = ["" if arm == base else _difference_text(numbers, arm, measure) for measure in measures]
        rows.append([arm, str(len(numbers.seeds(arm))), *means, *differences])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    repeated = any(numbers.mean(arm, "final").known for arm in numbers.arms)
    legend = (
        "[95 % t interval over seeds]; * the interval excludes 0, as it does by chance in one of 20 comparisons of "
        f"equal methods; {len(numbers.others)} were made in each column"
    )
    return "\n".join([*lines, legend if repeated else "one seed has no interval: repeat with three or more"])


def _difference_text(numbers: Numbers, arm: str, measure: str) -> str:
    """The difference to the reference with its interval, and a star where the interval excludes 0."""
    found = numbers.difference(arm, measure)
    if found is None:
        return ""
    return spread(found, "+.3f") + (" *" if found.excludes_zero else "")


def _missing(numbers: Numbers, runs: Sequence[PlannedRun], failed: dict[str, str]) -> list[str]:
    """A line for each run that is not complete."""
    lacking = [run.name for run in runs if (run.arm, run.seed) not in numbers.runs]
    return [f"{name} failed: {failed[name]}" if name in failed else name for name in lacking]


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        if rows:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
