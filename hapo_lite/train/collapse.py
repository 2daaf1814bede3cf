"""Warns of entropy collapse and length collapse once, as they start, while stopping the run can still save compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW = 3
"""Number of values at the beginning and at the end that are compared, since a single value is noisy."""
SOLVED = 0.9
"""With at least this share of correct completions, lower entropy and shorter completions cause no concern."""


@dataclass
class WatchedMetric:
    """A metric that has collapsed when its last values are all below `share` of the mean of its first values.

    warning: the sentence to print, with {start} and {now} for the values.
    """

    metric: str
    share: float
    warning: str
    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    warned: bool = False

    def see(self, value: float) -> bool:
        """Add a value. Returns True the first time that the metric has collapsed."""
        if len(self.first) < WINDOW:
            self.first.append(value)
            return False
        self.last.append(value)
        if self.warned or len(self.last) < WINDOW:
            return False
        self.warned = max(self.last) < self.share * self.start
        return self.warned

    @property
    def start(self) -> float:
        """Mean of the first values."""
        return sum(self.first) / len(self.first)


class CollapseWatch:
    """Reads the lines of metrics.jsonl in order, and returns the warnings that each one gives rise to."""

    def __init__(self) -> None:
        self.watched = (
            WatchedMetric(
                "entropy/all_mean",
                0.2,
                "entropy is collapsing, from {start:.2g} to {now:.2g} nats: completions become alike. "
                "Lower training.learning_rate, or raise method.eps_high",
            ),
            WatchedMetric(
                "length/mean",
                0.5,
                "completions are getting short, from {start:.0f} to {now:.0f} tokens: the policy may be giving up on "
                "reasoning. Look at traces/, lower training.learning_rate, or check the reward",
            ),
        )

    def see(self, line: Mapping[str, Any]) -> list[str]:
        """Read the next line. Returns a sentence for each metric that has just collapsed."""
        if "entropy/all_mean" not in line:
            return []  # Nothing was learned from: no group was kept, or a number was not finite.
        if line.get("reward/correct_share", 0.0) >= SOLVED:
            return []
        warnings = []
        for watched in self.watched:
            if watched.metric in line and watched.see(line[watched.metric]):
                sentence = watched.warning.format(start=watched.start, now=line[watched.metric])
                warnings.append(f"iteration {line['iteration']}: {sentence}")
        return warnings
