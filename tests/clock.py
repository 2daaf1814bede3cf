"""A clock that stands still, for what tells the time left."""

from __future__ import annotations

from hapo_lite.runs.progress import Writing


class Clock:
    """Seconds, which pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(writing: Writing, clock: Clock, running: list[int]) -> None:
    """A step of 0.1 s for each number of rows that go on after it."""
    for rows in running:
        clock.now += 0.1
        writing.wrote(rows)
