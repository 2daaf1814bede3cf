"""Entropy collapse and length collapse, said once, as they start: the night may be saved by stopping in time."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEEN = 3
"""Iterations at the beginning and at the end that are compared: one alone is noise."""
SOLVED = 0.9
"""Share of correct completions from which on less entropy and fewer tokens are no loss."""


@dataclass
class Fall:
    """One number. It has collapsed when the last values are all below `share` of the mean of the first ones."""

    metric: str
    share: float
    sentence: str
    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=SEEN))
    said: bool = False

    def see(self, value: float) -> bool:
        """Whether it has collapsed with this value, and had not before."""
        if len(self.first) < SEEN:
            self.first.append(value)
            return False
        self.last.append(value)
        if self.said or len(self.last) < SEEN:
            return False
        self.said = max(self.last) < self.share * self.start
        return self.said

    @property
    def start(self) -> float:
        return sum(self.first) / len(self.first)


class CollapseWatch:
    """Looks at every line of metrics.jsonl in turn, and returns what to warn of."""

    def __init__(self) -> None:
        self.falls = (
            Fall(
                "entropy/all_mean",
                0.2,
                "entropy is collapsing, from {start:.2g} to {now:.2g} nats, and completions alike. "
                "Lower training.learning_rate, or raise method.eps_high",
            ),
            Fall(
                "length/mean",
                0.5,
                "completions are getting short, from {start:.0f} to {now:.0f} tokens: the policy may be giving up on "
                "reasoning. Look at traces/, lower training.learning_rate, or see what the reward pays for",
            ),
        )

    def see(self, line: Mapping[str, Any]) -> list[str]:
        if "entropy/all_mean" not in line:
            return []  # nothing was learned from: no group was kept, or no number was finite
        solved = line.get("reward/correct_share", 0.0) >= SOLVED
        found = []
        for fall in self.falls:
            if fall.metric in line and not solved and fall.see(line[fall.metric]):
                sentence = fall.sentence.format(start=fall.start, now=line[fall.metric])
                found.append(f"iteration {line['iteration']}: {sentence}")
        return found
