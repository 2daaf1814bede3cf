"""The summary that a run shows at its end: the closing table and curves.png."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hapo_lite.recipe.sections import REWARD_NAME, TAKEN

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

NAMED_REWARD = re.compile(rf"reward/({REWARD_NAME})")
STAGES = ("rollout", "grade", "score", "update")
Panels = Sequence[tuple[str, dict[str, str]]]
"""The heading of each panel, and the labels of its metrics."""
PANELS: Panels = (
    ("reward and held-out accuracy", {"reward/mean": "training reward", "eval/accuracy": "held-out accuracy"}),
    (
        "entropy, nats",
        {"entropy/correct_mean": "correct", "entropy/wrong_mean": "not correct", "entropy/all_q80": "80 % quantile"},
    ),
    (
        "sampling temperature",
        {"temperature/max": "highest", "temperature/mean": "mean", "temperature/min": "lowest"},
    ),
    (
        "share of tokens clipped, or amplified by redistribution",
        {
            "clip/low_certain_share": "clipped low, h <= 0",
            "clip/low_uncertain_share": "clipped low, h > 0",
            "clip/high_certain_share": "clipped high, h <= 0",
            "clip/high_uncertain_share": "clipped high, h > 0",
            "credit/amplified_share": "amplified",
        },
    ),
    (
        "completion length, tokens",
        {"length/mean": "all", "length/correct_mean": "correct", "length/wrong_mean": "not correct"},
    ),
    ("seconds per iteration", {f"seconds/{stage}": stage for stage in STAGES}),
)


def reward_panel(lines: Lines) -> dict[str, str]:
    """The metrics of the named rewards, if the run has any, as a panel: label by metric."""
    found = {key: match[1] for line in lines for key in line if (match := NAMED_REWARD.fullmatch(key))}
    return {key: name for key, name in found.items() if name not in TAKEN}


def closing_table(lines: Lines, samples: int, metrics: Sequence[tuple[str, str]] = ROWS) -> str:
    """The first and the last value of each of the metrics, as text. samples: n of avg@n."""
    rows = []
    for key, label in metrics:
        values = [line[key] for line in lines if key in line]
        if values:
            rows.append((label.format(n=samples), f"{values[0]:.3f}", f"{values[-1]:.3f}"))
    if not rows:
        return "nothing was measured: the run had no iterations"
    width = max(len(label) for label, *_ in rows)
    table = [f"{'':{width}}  {'before':>8}  {'after':>8}"]
    table += [f"{label:{width}}  {before:>8}  {after:>8}" for label, before, after in rows]
    return "\n".join(table)


def draw_curves(lines: Lines, path: Path, title: str, panels: Panels = PANELS) -> None:
    """Draw the metrics of the panels, three in a row, over iterations into a PNG at `path`."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12, 3.9 * rows), layout="constrained")
    figure.suptitle(title)
    for axes, (heading, series) in zip(figure.subplots(rows, 3).flat, panels, strict=True):
        axes.set_title(heading, fontsize=10)
        for key, label in series.items():
            points = [(line["iteration"], line[key]) for line in lines if key in line]
            if points:
                marker = "o" if len(points) < 12 else None
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.4)
        if axes.lines:
            # Within the axes a legend would lie over curves that fill them.
            axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        if "temperature" not in heading:
            axes.set_ylim(bottom=0.0)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
