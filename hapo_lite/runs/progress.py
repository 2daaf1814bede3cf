"""How far the current stage is: counts, paces and the time left, without printing anything (display.py does that).

Stages report by adding to plain integers, so that a report costs nothing and waits for no device. A thread of the
display reads them about once a second.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Clock = Callable[[], float]
"""Seconds from some fixed moment."""


@dataclass(frozen=True)
class Numbers:
    """How far a stage is.

    done, total: in `unit`. tokens: written, or padded tokens computed. rows: completions being written at once; None
    where none are. seconds_left: None while nothing is known; at_most: it is a bound, since nothing has finished yet.
    """

    done: int
    total: int
    unit: str
    tokens: int = 0
    tokens_per_second: float | None = None
    rows: int | None = None
    seconds_left: float | None = None
    at_most: bool = False

    def __str__(self) -> str:
        """The time left comes early: a narrow terminal cuts the end off."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.seconds_left is not None:
            parts.append(f"{'at most ' * self.at_most}{in_words(self.seconds_left)} left")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self.rows:
            parts.append(f"{self.rows} rows left")
        return ", ".join(parts)


class Counting:
    """Work whose amount is known in advance: answers to grade, micro-batches to compute.

    total: in `unit`. size: padded tokens of all of it, by which the time left is reckoned; 0: by the count.
    """

    def __init__(self, total: int, unit: str, size: int = 0, clock: Clock = time.perf_counter) -> None:
        self.total, self.unit, self.size = total, unit, size
        self.clock = clock
        self.done = 0
        self.tokens = 0
        self.began = self._last = clock()

    def advance(self, count: int, tokens: int) -> None:
        """`count` more are done, of `tokens` padded tokens."""
        self.done += count
        self.tokens += tokens
        self._last = self.clock()

    def numbers(self) -> Numbers:
        # Both as of the last advance: between two of them nothing is known, and the pace has not fallen.
        spent, share, left = self._last - self.began, 0.0, None
        if self.total:
            share = min(1.0, self.tokens / self.size if self.size else self.done / self.total)
        if share:
            left = max(0.0, spent * (1.0 - share) / share - (self.clock() - self._last))
        pace = self.tokens / spent if self.tokens and spent > 0 else None
        return Numbers(min(self.done, self.total), self.total, self.unit, self.tokens, pace, seconds_left=left)


class Writing:
    """Completions being written by a rollout engine, part by part.

    total: completions in all. limit: the longest, tokens. refills: a row that has ended makes room for another
    completion; otherwise a part lasts as long as its longest completion.

    The mean length is taken as tokens written over completions finished. For completions that end with the same
    probability at every token this is the maximum-likelihood estimate, and it is not misled by those still running,
    whereas the mean of the finished ones is: the short ones finish first.
    """

    def __init__(self, total: int, limit: int, refills: bool = False, clock: Clock = time.perf_counter) -> None:
        self.total, self.limit, self.refills, self.clock = total, limit, refills, clock
        self.done = 0
        self.tokens = 0
        self.rows = 0
        self._waiting = total
        self._before = 0, 0  # completions and tokens of the parts before this one
        self._size = 0
        self._steps = 0
        self._first_steps = 0
        self._seconds: list[float] = []
        self.began = self._part_began = self._first = self._last = clock()

    def part(self, count: int, rows: int) -> None:
        """A part of `count` completions begins, of which `rows` are written at once."""
        self._before = self.done, self.tokens
        self._waiting -= count
        self._size, self.rows, self._steps, self._first_steps = count, rows, 0, 0
        self._part_began = self._last = self.clock()

    def drew(self, rows: int, steps: int = 1) -> None:
        """Each of `rows` completions is `steps` tokens longer."""
        self._last = self.clock()
        if self._steps == 0:
            # Reading the prompts is no part of a step's time.
            self._first, self._first_steps = self._last, steps
        self._steps += steps
        self.tokens += rows * steps
        self.rows = rows

    def wrote(self, running: int, steps: int = 1) -> None:
        """Every row is `steps` tokens longer, and `running` of the rows go on."""
        ended = self.rows - running
        self.drew(self.rows, steps)
        self.finished(ended)
        self.rows = running

    def finished(self, count: int = 1) -> None:
        """`count` more completions have ended."""
        self.done += count

    def part_ended(self, tokens: int) -> None:
        """All completions of the part are there, with `tokens` tokens: from here on the counts are exact."""
        done, before = self._before
        self.done, self.tokens = done + self._size, before + tokens
        self.rows = 0
        self._seconds.append(self.clock() - self._part_began)

    def numbers(self) -> Numbers:
        # When all are written, what the stage still does is not known.
        over = self.done == self.total
        seconds = (self._last if over else self.clock()) - self.began
        pace = self.tokens / seconds if self.tokens and seconds > 0 else None
        return Numbers(
            self.done,
            self.total,
            "completions",
            self.tokens,
            pace,
            self.rows,
            seconds_left=None if over else self._seconds_left(pace),
            at_most=self.done == 0,
        )

    def _seconds_left(self, pace: float | None) -> float | None:
        if not pace:
            return None
        # Read once: they change meanwhile, in another thread.
        done, rows, steps, waiting = self.done, self.rows, self._steps, self._waiting
        mean = self.tokens / done if done else math.inf
        if self.refills:
            return self._tokens_left(mean) / pace
        each = sum(self._seconds) / len(self._seconds) if self._seconds else None
        if timed := steps - self._first_steps:
            # A GPU's step takes about as long with few rows as with many, so steps are counted and not tokens.
            step = (self._last - self._first) / timed
            left = longest(rows, mean, self.limit - steps) * step
            reading = self._first - self._part_began
            each = reading + longest(self._size, mean, self.limit) * step if each is None else each
        elif each is not None:
            left = max(0.0, each - (self.clock() - self._part_began)) if rows else 0.0
        else:
            return None
        return left + math.ceil(waiting / self._size) * each

    def _tokens_left(self, mean: float) -> float:
        if math.isinf(mean):
            return self.total * self.limit - self.tokens
        # No completion is longer than the limit, whatever its mean without one would be.
        return (self.total - self.done) * mean * (1.0 - math.exp(-self.limit / mean))


def longest(rows: int, mean: float, room: int) -> float:
    """Expected tokens of the longest of `rows` completions of a mean length, if none ends later than `room`."""
    if rows == 0:
        return 0.0
    return float(room) if math.isinf(mean) else min(float(room), mean * sum(1.0 / i for i in range(1, rows + 1)))


class Progress:
    """The current stage and how far it is. Stages tell; the display and status.json are told.

    entered: called with the name of each stage that begins, before anything of it is done.
    """

    def __init__(self, entered: Callable[[str], None] = lambda stage: None, clock: Clock = time.perf_counter) -> None:
        self.entered, self.clock = entered, clock
        self.stage = "starting"
        self.since = clock()
        self.work: Counting | Writing | None = None
        self._within: list[str] = []

    def enter(self, stage: str) -> None:
        """`stage` begins, and the one before it has ended."""
        self.entered(stage)
        self.work = None
        self.stage, self.since = stage, self.clock()

    @contextlib.contextmanager
    def within(self, what: str) -> Iterator[None]:
        """While it lasts, the line says `what` is being done, such as "4 of 16 groups kept"."""
        self._within.append(what)
        try:
            yield
        finally:
            self._within.pop()

    def count(self, total: int, unit: str, size: int = 0) -> None:
        """The stage, or its next pass, is so much work, as `Counting` has it."""
        self.work = Counting(total, unit, size, self.clock)

    def advance(self, count: int = 1, tokens: int = 0) -> None:
        """`count` more of what is counted are done, of `tokens` padded tokens. Without effect if nothing is counted."""
        if isinstance(self.work, Counting):
            self.work.advance(count, tokens)

    def write(self, total: int, limit: int, refills: bool = False) -> Writing:
        """The stage writes so many completions; what is returned is to be told of them."""
        self.work = Writing(total, limit, refills, self.clock)
        return self.work

    @property
    def about(self) -> str:
        """What `within` says, outermost first; "" where it says nothing."""
        return ", ".join(filter(None, self._within))

    def numbers(self) -> Numbers | None:
        """None where the stage counts nothing."""
        work = self.work
        return None if work is None else work.numbers()

    def __str__(self) -> str:
        """The stage in words. How long it has lasted is said where the time left is not known."""
        name = ", ".join(filter(None, [self.stage, self.about]))
        so_far = f"{in_words(self.clock() - self.since)} so far"
        numbers = self.numbers()
        if numbers is None:
            return f"{name}: {so_far}"
        return f"{name}: {numbers}" if numbers.seconds_left is not None else f"{name}: {numbers}, {so_far}"


def in_words(seconds: float) -> str:
    """40 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
