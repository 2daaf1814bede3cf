"""How long a comparison takes, estimated from the pace of its runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hapo_lite.compare.plan import PlannedRun
from hapo_lite.errors import counted
from hapo_lite.runs.folder import RunFolder
from hapo_lite.runs.progress import in_words

ENOUGH = 0.1
"""Smallest fraction of a run from which its pace is estimated."""


@dataclass(frozen=True)
class Seen:
    """The fraction of a run that was done at a time, in seconds of the monotonic clock."""

    time: float
    done: float


@dataclass
class RunningRun:
    """A run that is going on. started: when it was started, and the fraction that an earlier command had done.

    first, latest: its first and its latest iteration that were seen.
    """

    run: PlannedRun
    started: Seen
    first: Seen | None = None
    latest: Seen | None = None


class Pace:
    """Seconds of a whole run, and of the runs that are left.

    A run that this command has made is timed by the clock, start-up included; a run of an earlier command by its own
    metrics. Without either, the seconds follow from the part that a running run has done.
    """

    def __init__(self, runs: Sequence[PlannedRun], complete: Collection[str], workers: int) -> None:
        self.count = len(runs)
        self.workers = workers
        self.left = [run for run in runs if run.name not in complete]
        self.earlier = [recorded_seconds(run) for run in runs if run.name in complete]
        self.timed: list[float] = []
        self.running: dict[str, RunningRun] = {}

    def begin(self, run: PlannedRun) -> None:
        """A run has been started."""
        self.running[run.name] = RunningRun(run, Seen(time.monotonic(), self.fraction(run)))

    def end(self, run: PlannedRun) -> None:
        """A run is complete."""
        started = self.running.pop(run.name).started
        self.left.remove(run)
        if started.done < 1.0 - ENOUGH:
            self.timed.append((time.monotonic() - started.time) / (1.0 - started.done))

    def give_up(self, run: PlannedRun) -> None:
        """A run has failed."""
        self.running.pop(run.name)
        self.left.remove(run)

    def fraction(self, run: PlannedRun) -> float:
        """The fraction of its tokens or iterations, whichever is larger, that a run has done."""
        last = RunFolder(run.recipe.run_dir).metrics.last()
        training = run.recipe.training
        tokens = last.get("tokens", 0) / training.max_tokens
        return min(1.0, max(tokens, last.get("iteration", 0) / training.iterations))

    def seconds_per_run(self) -> float | None:
        """Mean seconds of a run; None as long as no pace is known."""
        known = self.timed or self.earlier
        if not known:
            projected = [self._projected(running) for running in self.running.values()]
            known = [seconds for seconds in projected if seconds is not None]
        return sum(known) / len(known) if known else None

    def seconds_left(self) -> float | None:
        """Seconds until all runs have ended; None as long as no pace is known."""
        each = self.seconds_per_run()
        return None if each is None else self._seconds_left_at(each)

    def _seconds_left_at(self, each: float) -> float:
        missing = [1.0 - self.fraction(run) if run.name in self.running else 1.0 for run in self.left]
        return each * max(sum(missing) / self.workers, max(missing, default=0.0))

    def left_in_words(self) -> str:
        seconds = self.seconds_left()
        return "time left not known yet" if seconds is None else f"{in_words(seconds)} left"

    def beforehand(self) -> str:
        """A sentence about the time that the runs will take, before any is started."""
        done = self.count - len(self.left)
        each = self.seconds_per_run()
        several = f", {self.workers} at a time" if self.workers > 1 else ""
        if each is None:
            return (
                f"{counted(self.count, 'run')}{several}; how long they take is known when the first is a tenth through"
            )
        total = in_words(self._seconds_left_at(each))
        return f"{done} of {self.count} runs are complete; the others take about {total}{several}, at the pace of those"

    def first_estimate(self) -> str | None:
        """A sentence about the time that all runs take, from the pace of the first.

        None where that pace is not known, or where `beforehand` has stated the time.
        """
        each = self.seconds_per_run()
        if self.timed or self.earlier or each is None:
            return None
        left = self._seconds_left_at(each)
        return (
            f"at this pace a run takes {in_words(each)}, and {len(self.left)} of them "
            f"{in_words(each * max(len(self.left) / self.workers, 1.0))}: {in_words(left)} left, until {until(left)}"
        )

    def _projected(self, running: RunningRun) -> float | None:
        """Seconds of a whole run that is going on: those to its first iteration, then the pace since that iteration."""
        done = self.fraction(running.run)
        started = running.started
        if done > (running.latest or started).done:
            running.latest = Seen(time.monotonic(), done)
            running.first = running.first or running.latest
        first, latest = running.first, running.latest
        if first is None or latest is None or latest.done - first.done < ENOUGH:
            return None
        pace = (latest.time - first.time) / (latest.done - first.done)
        return (first.time - started.time) + pace * (1.0 - first.done + started.done)


def recorded_seconds(run: PlannedRun) -> float:
    """Seconds of training and evaluation of a complete run, from its metrics."""
    lines = RunFolder(run.recipe.run_dir).metrics.read()
    return sum(x.get("seconds/iteration", 0.0) + x.get("seconds/evaluate", 0.0) for x in lines)


def until(seconds: float) -> str:
    """The time of day after so many seconds, with the date if it is another day."""
    end = time.localtime(time.time() + seconds)
    today = time.strftime("%j", end) == time.strftime("%j")
    return time.strftime("%H:%M" if today else "%d %b %H:%M", end)
