"""The runs of a comparison, one after another or several at a time, each in a process of its own.

A run that is complete is not repeated, one that was interrupted goes on from its checkpoint, and one that fails does
not end the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from tqdm.auto import tqdm

from hapo_lite.compare.pace import Pace
from hapo_lite.compare.plan import Comparison, PlannedRun
from hapo_lite.errors import UserError, writing
from hapo_lite.recipe import Recipe
from hapo_lite.runs.files import inside
from hapo_lite.runs.folder import RunFolder, changed_setting, check_place, check_same_run, recipe_of, with_date_of
from hapo_lite.runs.interrupt import Interrupted, Interrupts

POLL_S = 0.2
SHOW_S = 1.0
"""Seconds between two drawings of the line with the time left."""
OF_TRAINING = {"name", "method", "training"}
"""Settings on which the evaluation before training does not depend."""
PATIENCE_S = 60.0
"""Seconds that the runs of a comparison that was killed may take to save."""


@dataclass
class Child:
    """A run that is going on. log: the file with its output; pipe: its standard input, open as long as it is to run."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)


def run_all(comparison: Comparison, runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Train every run that is not complete, and return a sentence for each run that failed, by the run's name.

    Raises UserError if no run can be started, and Interrupted for a signal, once the runs have saved.
    """
    at_once = runs_at_once(comparison.workers)
    inside(comparison.folder.parent, comparison.folder)
    for run in runs:
        check_place(RunFolder(run.recipe.run_dir))
        if not is_complete(run):
            check_same_run(RunFolder(run.recipe.run_dir), run.recipe)
    with writing(comparison.folder):
        (comparison.folder / "logs").mkdir(parents=True, exist_ok=True)
    with locked(comparison.folder) as lock:
        with writing(comparison.folder):
            (comparison.folder / "comparison.yaml").write_text(comparison.to_yaml(), encoding="utf-8")
        return Runner(comparison.model_copy(update={"workers": at_once}), runs, lock).work()


class Runner:
    """Starts runs, watches them, and shows their progress."""

    def __init__(self, comparison: Comparison, runs: Sequence[PlannedRun], lock: int) -> None:
        self.comparison = comparison
        self.runs = runs
        self.lock = lock
        self.complete = {run.name for run in runs if is_complete(run)}
        self.waiting = [run for run in runs if run.name not in self.complete]
        self.failed: dict[str, str] = {}
        self.children: list[Child] = []
        self.pace = Pace(runs, self.complete, comparison.workers)
        self.bar = tqdm(total=1.0, bar_format="{desc}", disable=None, leave=False)
        self.announced = False
        self.shown = 0.0

    def work(self) -> dict[str, str]:
        """Run everything that waits, and return a sentence for each run that failed, by the run's name."""
        interrupts = Interrupts(deferred=True)
        if self.waiting:
            self.say(self.pace.beforehand())
        with self.bar, interrupts.listening():
            try:
                while self.waiting or self.children:
                    while self.waiting and len(self.children) < self.comparison.workers:
                        self.children.append(self.start(self.waiting.pop(0)))
                    time.sleep(POLL_S)
                    self.children = [child for child in self.children if not self.ended(child)]
                    self.show()
                    if interrupts.pending is not None:
                        raise Interrupted(interrupts.pending)
            finally:
                self.stop()
        return self.failed

    def start(self, run: PlannedRun) -> Child:
        """Start one run in a process of its own."""
        log = self.comparison.folder / "logs" / f"{run.name}.log"
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.comparison.workers > 1 else {}
        with writing(log), log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "hapo_lite.compare.child"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | threads,
                # Ctrl-C reaches this process alone, which passes it on. Runs may outlive it, so they hold the lock too.
                start_new_session=True,
                pass_fds=(self.lock,),
            )
        recipe = on_one_day(run, self.runs)
        order = {"recipe": recipe.model_dump(mode="json"), "measured": measured_alike(recipe, self.runs)}
        pipe = process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # The run ended at once; its log says why.
            pipe.write(json.dumps(order).encode() + b"\n")
            pipe.flush()
        self.pace.begin(run)
        return Child(run, process, pipe, log)

    def ended(self, child: Child) -> bool:
        """Whether a run has ended. The outcome of a run that has is recorded and printed."""
        code = child.process.poll()
        if code is None:
            return False
        child.pipe.close()
        name = child.run.name
        if code == 0 and is_complete(child.run):
            self.complete.add(name)
            self.pace.end(child.run)
            self.say(f"{name}: {outcome(child.run)}; {self.pace.left_in_words()}")
        else:
            self.failed[name] = failure(child.log, code)
            self.pace.give_up(child.run)
            self.say(f"{name} FAILED: {self.failed[name]}; the others go on")
        return True

    def show(self) -> None:
        """Draw the line with the time left, and once print the estimate that the first run's pace allows."""
        if time.monotonic() - self.shown < SHOW_S:
            return
        self.shown = time.monotonic()
        estimate = None if self.announced else self.pace.first_estimate()
        if estimate is not None:
            self.announced = True
            self.say(estimate)
        going = ", ".join(f"{c.run.name} {100 * self.pace.fraction(c.run):.0f} %" for c in self.children)
        self.bar.set_description_str(
            f"{len(self.complete)} of {self.pace.count} runs, {going}; {self.pace.left_in_words()}"
        )

    def say(self, sentence: str) -> None:
        """Print a sentence above the line with the time left."""
        # The output may go to a file that is read while the runs go on, so it is flushed.
        with tqdm.external_write_mode():
            print(sentence, flush=True)

    def stop(self) -> None:
        """Have the runs save and end."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.process.wait()
            child.pipe.close()


def on_one_day(run: PlannedRun, runs: Sequence[PlannedRun]) -> Recipe:
    """The recipe of a run, with the date that its chat template took before or, for a new run, that of another run.

    A comparison goes on over midnight, and its runs are to see the same prompts.
    """
    recipe = run.recipe
    for other in (run, *runs):
        recipe = with_date_of(RunFolder(other.recipe.run_dir), recipe)
    return recipe


def measured_alike(recipe: Recipe, runs: Sequence[PlannedRun]) -> str | None:
    """The folder of another run that has measured, before training, what `recipe` would: policy, prompts and draws.

    Its own recipe file says so, since the settings of a comparison may have changed. None if there is no such run.
    """
    wanted = recipe.model_dump(mode="json", exclude=OF_TRAINING)
    for folder in (RunFolder(other.recipe.run_dir) for other in runs):
        if folder.path != recipe.run_dir and folder.metrics.last() and folder.recipe.is_file():
            with contextlib.suppress(UserError):
                found = recipe_of(folder)
                if {key: value for key, value in found.items() if key not in OF_TRAINING} == wanted:
                    return str(folder.path)
    return None


def is_complete(run: PlannedRun) -> bool:
    """Whether the run was trained under this recipe to its tokens or iterations, and has written its summary."""
    folder = RunFolder(run.recipe.run_dir)
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        training = run.recipe.training
        enough = summary["sampled_tokens"] >= training.max_tokens or summary["iterations"] >= training.iterations
        return enough and changed_setting(folder, run.recipe) is None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False


def outcome(run: PlannedRun) -> str:
    """A phrase with the first and last held-out accuracy of a complete run."""
    found = [x["eval/accuracy"] for x in RunFolder(run.recipe.run_dir).metrics.read() if "eval/accuracy" in x]
    return f"held-out accuracy {found[0]:.3f} -> {found[-1]:.3f}" if found else "complete"


def failure(log: Path, code: int) -> str:
    """Why a run failed: its own error, else its exit code and its last line of output."""
    try:
        lines = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return f"{errors[-1]} ({log})"
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1]} ({log})" if lines else f"{how} ({log})"


def runs_at_once(workers: int) -> int:
    """`workers`, or 1 and a printed note where there is a GPU. Raises UserError under a launcher of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a comparison starts its runs itself: call it without accelerate launch or torchrun")
    if workers > 1 and torch.cuda.is_available():
        print(
            f"note: runs go one after another on a GPU, since each wants all of its memory: workers = {workers} counts "
            "as 1. CUDA_VISIBLE_DEVICES= in front of the command keeps them on the CPU",
            flush=True,
        )
        return 1
    return workers


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock the comparison's folder. Raises UserError if another command does not release its lock in PATIENCE_S.

    Yields the lock's file descriptor. Runs inherit the lock, which lasts until the last of them has ended; that of the
    package filelock would end with this process.
    """
    with writing(folder), (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + PATIENCE_S
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print(f"waiting for the runs of another command in {folder} to save and end", flush=True)
                    told = True
                if time.monotonic() > deadline:
                    raise UserError(f"another command works on {folder}: wait for it, or choose another name") from None
                time.sleep(POLL_S)
        yield file.fileno()
