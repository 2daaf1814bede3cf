"""How long a comparison takes, from the pace of the runs that were made."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hapo_lite.compare.plan import PlannedRun
from hapo_lite.runs.folder import RunFolder
from hapo_lite.runs.progress import in_words

ENOUGH = 0.1
"""Share of a run from which its pace is believed."""


@dataclass
class Begun:
    """A run that is going on: when it was started and with how much of it done.

    first, last: when its first and its latest iteration were seen, and how much was done then.
    """

    run: PlannedRun
    started: float
    before: float
    first: tuple[float, float] | None = None
    last: tuple[float, float] | None = None


class Pace:
    """Seconds of a whole run, and what follows for those that are left.

    A run that ended under our eyes is timed by the clock, start-up included; one from an earlier command by its own
    metrics; where there is neither, by the part that a running one has done.
    """

    def __init__(self, runs: Sequence[PlannedRun], complete: Collection[str], workers: int) -> None:
        self.count, self.workers = len(runs), workers
        self.left = [run for run in runs if run.name not in complete]
        self.earlier = [recorded_seconds(run) for run in runs if run.name in complete]
        self.timed: list[float] = []
        self.begun: dict[str, Begun] = {}

    def begin(self, run: PlannedRun) -> None:
        self.begun[run.name] = Begun(run, time.monotonic(), self.fraction(run))

    def end(self, run: PlannedRun) -> None:
        begun = self.begun.pop(run.name)
        self.left.remove(run)
        if begun.before < 1.0 - ENOUGH:
            self.timed.append((time.monotonic() - begun.started) / (1.0 - begun.before))

    def give_up(self, run: PlannedRun) -> None:
        self.begun.pop(run.name)
        self.left.remove(run)

    def fraction(self, run: PlannedRun) -> float:
        """How much of its tokens, or of its iterations, a run has done."""
        last = RunFolder(run.recipe.run_dir).metrics.last()
        training = run.recipe.training
        done = last.get("tokens", 0) / training.max_tokens, last.get("iteration", 0) / training.iterations
        return min(1.0, max(done))

    def seconds_per_run(self) -> float | None:
        """None as long as nothing is known."""
        known = self.timed or self.earlier
        if not known:
            known = [seconds for begun in self.begun.values() if (seconds := self._projected(begun)) is not None]
        return sum(known) / len(known) if known else None

    def seconds_left(self) -> float | None:
        each = self.seconds_per_run()
        if each is None:
            return None
        missing = [1.0 - self.fraction(run) if run.name in self.begun else 1.0 for run in self.left]
        return each * max(sum(missing) / self.workers, max(missing, default=0.0))

    def left_in_words(self) -> str:
        seconds = self.seconds_left()
        return "time left not known yet" if seconds is None else f"{in_words(seconds)} left"

    def beforehand(self) -> str:
        """What is ahead, before any of it."""
        done = self.count - len(self.left)
        each, several = self.seconds_per_run(), f", {self.workers} at a time" if self.workers > 1 else ""
        if each is None:
            return f"{self.count} runs{several}; how long they take is known when the first is a tenth through"
        total = in_words(self.seconds_left())
        return f"{done} of {self.count} runs are complete; the others take about {total}{several}, at the pace of those"

    def first_estimate(self) -> str | None:
        """From the first run's pace, how long all of them take; None where it is not known, or was said beforehand."""
        if self.timed or self.earlier or (each := self.seconds_per_run()) is None:
            return None
        return (
            f"at this pace a run takes {in_words(each)}, and {len(self.left)} of them "
            f"{in_words(each * max(len(self.left) / self.workers, 1.0))}: {in_words(self.seconds_left())} left, "
            f"until {until(self.seconds_left())}"
        )

    def _projected(self, begun: Begun) -> float | None:
        """Seconds of the whole of a running run: up to its first iteration, and the pace from there on."""
        done = self.fraction(begun.run)
        if done > (begun.last[1] if begun.last else begun.before):
            begun.last = time.monotonic(), done
            begun.first = begun.first or begun.last
        if begun.first is None or begun.last[1] - begun.first[1] < ENOUGH:
            return None
        (since, at), (now, done) = begun.first, begun.last
        return (since - begun.started) + (now - since) / (done - at) * (1.0 - at + begun.before)


def recorded_seconds(run: PlannedRun) -> float:
    """Training and evaluation of a complete run, by its metrics."""
    lines = RunFolder(run.recipe.run_dir).metrics.read()
    return sum(x.get("seconds/iteration", 0.0) + x.get("seconds/evaluate", 0.0) for x in lines)


def until(seconds: float) -> str:
    """The time of day at which so many seconds will have passed, with the date if it is another day."""
    end = time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if time.strftime("%j", end) == time.strftime("%j") else "%d %b %H:%M", end)
