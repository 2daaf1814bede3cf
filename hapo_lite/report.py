"""What a run shows at its end: the closing table and curves.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Lines = Sequence[dict[str, Any]]

ROWS = (
    ("eval/accuracy", "held-out accuracy, avg@{n}"),
    ("eval/length_mean", "held-out length, tokens"),
    ("eval/truncated_share", "held-out cut off at the limit"),
    ("eval/unparseable_share", "held-out without an answer"),
    ("reward/mean", "training reward"),
    ("entropy/all_mean", "training entropy, nats"),
    ("groups/equal_share", "training groups with equal rewards"),
    ("seconds/iteration", "seconds per iteration"),
)


def closing_table(lines: Lines, samples: int) -> str:
    """First against last value of the numbers that matter, as text."""
    rows = []
    for key, label in ROWS:
        values = [line[key] for line in lines if key in line]
        if values:
            rows.append((label.format(n=samples), f"{values[0]:.3f}", f"{values[-1]:.3f}"))
    if not rows:
        return "nothing was measured: the run had no iterations"
    width = max(len(label) for label, *_ in rows)
    table = [f"{'':{width}}  {'before':>8}  {'after':>8}"]
    table += [f"{label:{width}}  {before:>8}  {after:>8}" for label, before, after in rows]
    return "\n".join(table)


def draw_curves(lines: Lines, path: Path, title: str) -> None:
    """Six panels over iterations: accuracy and reward, entropy, temperature, clipping, length, seconds by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 3).flat
    _panel(
        next(panels),
        lines,
        "reward and held-out accuracy",
        {"reward/mean": "training reward", "eval/accuracy": "held-out accuracy"},
        bottom=0.0,
    )
    _panel(
        next(panels),
        lines,
        "entropy, nats",
        {"entropy/correct_mean": "correct", "entropy/wrong_mean": "not correct", "entropy/all_q80": "80 % quantile"},
        bottom=0.0,
    )
    _panel(
        next(panels),
        lines,
        "sampling temperature",
        {"temperature/max": "highest", "temperature/mean": "mean", "temperature/min": "lowest"},
    )
    _panel(
        next(panels),
        lines,
        "share of tokens clipped, or amplified by redistribution",
        {
            "clip/low_certain_share": "clipped low, h <= 0",
            "clip/low_uncertain_share": "clipped low, h > 0",
            "clip/high_certain_share": "clipped high, h <= 0",
            "clip/high_uncertain_share": "clipped high, h > 0",
            "credit/amplified_share": "amplified",
        },
        bottom=0.0,
    )
    _panel(
        next(panels),
        lines,
        "completion length, tokens",
        {"length/mean": "all", "length/correct_mean": "correct", "length/wrong_mean": "not correct"},
        bottom=0.0,
    )
    _panel(
        next(panels),
        lines,
        "seconds per iteration",
        {f"seconds/{stage}": stage for stage in ("rollout", "grade", "score", "update")},
        bottom=0.0,
    )
    figure.savefig(path, dpi=110)


def _panel(axes, lines: Lines, title: str, series: dict[str, str], bottom: float | None = None) -> None:
    axes.set_title(title, fontsize=10)
    for key, label in series.items():
        points = [(line["iteration"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 12 else None, linewidth=1.4)
    if axes.lines:
        axes.legend(fontsize=8, frameon=False)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    axes.set_xlabel("iteration", fontsize=8)
    axes.grid(alpha=0.25)
