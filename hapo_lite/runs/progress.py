"""The progress of the current stage: counts, paces and the time left. display.py prints them.

Stages report by adding to plain integers, so that a report costs next to nothing and waits for no device. A thread of
the display reads the integers about once a second.
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
    """The progress of a stage at one moment.

    done, total: in `unit`. tokens: tokens written, or padded tokens computed. rows: completions being written at once;
    None for a stage that writes none. seconds_left: None while it is unknown. at_most: whether seconds_left is an upper
    bound, as it is until something has finished.
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
        """The numbers in words. The time left comes early, since a narrow terminal cuts the end off."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.seconds_left is not None:
            bound = "at most " if self.at_most else ""
            parts.append(f"{bound}{in_words(self.seconds_left)} left")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens")
        if self.rows:
            parts.append(f"{self.rows} rows left")
        return ", ".join(parts)


class Counting:
    """Work whose amount is known in advance: answers to grade, micro-batches to compute.

    total: in `unit`. size: padded tokens of the whole work, from which the time left is estimated; 0: it is estimated
    from the count.
    """

    def __init__(self, total: int, unit: str, size: int = 0, clock: Clock = time.perf_counter) -> None:
        self.total = total
        self.unit = unit
        self.size = size
        self.clock = clock
        self.done = 0
        self.tokens = 0
        self.began = clock()
        self._last = self.began

    def advance(self, count: int, tokens: int) -> None:
        """Count `count` more as done, which have `tokens` padded tokens."""
        self.done += count
        self.tokens += tokens
        self._last = self.clock()

    def numbers(self) -> Numbers:
        """The progress now."""
        # Share and seconds are those of the last advance, so that the pace does not fall between two of them.
        spent = self._last - self.began
        share = self._share_done()
        left = None
        if share:
            left = max(0.0, spent * (1.0 - share) / share - (self.clock() - self._last))
        pace = self.tokens / spent if self.tokens and spent > 0 else None
        return Numbers(min(self.done, self.total), self.total, self.unit, self.tokens, pace, seconds_left=left)

    def _share_done(self) -> float:
        if not self.total:
            return 0.0
        return min(1.0, self.tokens / self.size if self.size else self.done / self.total)


class Writing:
    """Completions that a rollout engine writes, part by part.

    total: number of completions. limit: length of the longest in tokens. refills: whether a row that has ended makes
    room for another completion; otherwise a part lasts as long as its longest completion.

    The mean length is estimated as tokens written over completions finished. This is the maximum-likelihood estimate if
    completions end with the same probability at every token. The mean length of the finished completions alone would be
    too low, since short completions finish first.
    """

    def __init__(self, total: int, limit: int, refills: bool = False, clock: Clock = time.perf_counter) -> None:
        self.total = total
        self.limit = limit
        self.refills = refills
        self.clock = clock
        self.done = 0
        self.tokens = 0
        self.rows = 0
        self.began = clock()
        self._waiting = total  # completions of the parts that have not begun
        self._done_before = 0  # completions and tokens of the parts before this one
        self._tokens_before = 0
        self._size = 0  # completions of this part
        self._steps = 0  # tokens that each row has been given in this part
        self._first_steps = 0  # those of them that came with the reading of the prompts
        self._part_seconds: list[float] = []
        self._part_began = self.began
        self._first = self.began  # when the part's first tokens were drawn
        self._last = self.began

    def part(self, count: int, rows: int) -> None:
        """Begin a part of `count` completions, of which `rows` are written at once."""
        self._done_before = self.done
        self._tokens_before = self.tokens
        self._waiting -= count
        self._size = count
        self.rows = rows
        self._steps = 0
        self._first_steps = 0
        self._part_began = self.clock()
        self._last = self._part_began

    def drew(self, rows: int, steps: int = 1) -> None:
        """Make each of `rows` completions `steps` tokens longer."""
        self._last = self.clock()
        if self._steps == 0:
            # The time for reading the prompts does not count as part of a step.
            self._first = self._last
            self._first_steps = steps
        self._steps += steps
        self.tokens += rows * steps
        self.rows = rows

    def wrote(self, running: int, steps: int = 1) -> None:
        """Make every row `steps` tokens longer; `running` of the rows continue."""
        ended = self.rows - running
        self.drew(self.rows, steps)
        self.finished(ended)
        self.rows = running

    def finished(self, count: int = 1) -> None:
        """Count `count` more completions as finished."""
        self.done += count

    def part_ended(self, tokens: int) -> None:
        """End the part, whose completions have `tokens` tokens in all. This makes the counts exact."""
        self.done = self._done_before + self._size
        self.tokens = self._tokens_before + tokens
        self.rows = 0
        self._part_seconds.append(self.clock() - self._part_began)

    def numbers(self) -> Numbers:
        """The progress now."""
        # The stage may do more after the last completion, for which no time can be estimated.
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
        # Each number is read once, since another thread changes them meanwhile.
        done = self.done
        rows = self.rows
        steps = self._steps
        waiting = self._waiting
        mean = self.tokens / done if done else math.inf
        if self.refills:
            return self._tokens_left(mean) / pace
        per_part = sum(self._part_seconds) / len(self._part_seconds) if self._part_seconds else None
        timed = steps - self._first_steps
        if timed:
            # A GPU's step takes about as long with few rows as with many, so steps are counted and not tokens.
            per_step = (self._last - self._first) / timed
            left = longest(rows, mean, self.limit - steps) * per_step
            if per_part is None:
                reading = self._first - self._part_began
                per_part = reading + longest(self._size, mean, self.limit) * per_step
        elif per_part is not None:
            left = max(0.0, per_part - (self.clock() - self._part_began)) if rows else 0.0
        else:
            return None
        return left + math.ceil(waiting / self._size) * per_part

    def _tokens_left(self, mean: float) -> float:
        if math.isinf(mean):
            return self.total * self.limit - self.tokens
        # The last factor accounts for completions that the limit cuts off.
        return (self.total - self.done) * mean * (1.0 - math.exp(-self.limit / mean))


def longest(rows: int, mean: float, room: int) -> float:
    """Expected tokens of the longest of `rows` completions with mean length `mean`, at most `room`."""
    if rows == 0:
        return 0.0
    if math.isinf(mean):
        return float(room)
    # The maximum of n exponential variables has the mean 1/1 + 1/2 + ... + 1/n.
    return min(float(room), mean * sum(1.0 / i for i in range(1, rows + 1)))


class Progress:
    """The current stage and its progress. Stages report to it; the display and status.json read it.

    entered: called with the name of each stage that begins, before the stage does anything.
    """

    def __init__(self, entered: Callable[[str], None] = lambda stage: None, clock: Clock = time.perf_counter) -> None:
        self.entered = entered
        self.clock = clock
        self.stage = "starting"
        self.since = clock()
        self.work: Counting | Writing | None = None
        self._within: list[str] = []

    def enter(self, stage: str) -> None:
        """Begin `stage`, which ends the one before it."""
        self.entered(stage)
        self.work = None
        self.stage = stage
        self.since = self.clock()

    @contextlib.contextmanager
    def within(self, what: str) -> Iterator[None]:
        """A context in which the display adds `what`, such as "4 of 16 groups kept"."""
        self._within.append(what)
        try:
            yield
        finally:
            self._within.pop()

    def count(self, total: int, unit: str, size: int = 0) -> None:
        """Begin the stage's work, or its next pass. The arguments are those of `Counting`."""
        self.work = Counting(total, unit, size, self.clock)

    def advance(self, count: int = 1, tokens: int = 0) -> None:
        """Count `count` more as done, which have `tokens` padded tokens. Does nothing without a preceding `count`."""
        if isinstance(self.work, Counting):
            self.work.advance(count, tokens)

    def write(self, total: int, limit: int, refills: bool = False) -> Writing:
        """Begin to write `total` completions of at most `limit` tokens. The caller reports to the returned object."""
        self.work = Writing(total, limit, refills, self.clock)
        return self.work

    @property
    def about(self) -> str:
        """The texts of the surrounding `within` contexts, outermost first; "" without any."""
        return ", ".join(filter(None, self._within))

    def numbers(self) -> Numbers | None:
        """The stage's progress; None for a stage that counts nothing."""
        work = self.work
        return None if work is None else work.numbers()

    def __str__(self) -> str:
        """The stage in words, with the time left or, while that is unknown, the time so far."""
        name = ", ".join(filter(None, [self.stage, self.about]))
        so_far = f"{in_words(self.clock() - self.since)} so far"
        numbers = self.numbers()
        if numbers is None:
            return f"{name}: {so_far}"
        if numbers.seconds_left is None:
            return f"{name}: {numbers}, {so_far}"
        return f"{name}: {numbers}"


def in_words(seconds: float) -> str:
    """A duration such as "40 s", "12 min", "3 h 20 min" or "2 d 4 h"."""
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
