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

import torch
from tqdm.auto import tqdm

from hapo_lite.compare.pace import Pace
from hapo_lite.compare.plan import Comparison, PlannedRun
from hapo_lite.errors import UserError, writing
from hapo_lite.runs.files import inside
from hapo_lite.runs.folder import RunFolder, changed_setting, check_place, check_same_run
from hapo_lite.runs.interrupt import Interrupted, Interrupts

POLL_S, SHOW_S = 0.2, 1.0
PATIENCE_S = 60.0
"""How long the runs of a comparison that was killed may take to save."""


@dataclass
class Child:
    """A run that is going on. log: what it prints."""

    run: PlannedRun
    process: subprocess.Popen
    log: Path
    started: float = field(default_factory=time.monotonic)


def run_all(comparison: Comparison, runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Train what is not complete, and return a sentence for each run that failed, by its name.

    Raises UserError for what stands in the way of all of them, and Interrupted once the runs have saved.
    """
    check_machine(comparison.workers)
    inside(comparison.folder.parent, comparison.folder)
    for run in runs:
        check_place(RunFolder(run.recipe.run_dir))
        check_same_run(RunFolder(run.recipe.run_dir), run.recipe)
    with writing(comparison.folder):
        (comparison.folder / "logs").mkdir(parents=True, exist_ok=True)
    with locked(comparison.folder) as lock:
        with writing(comparison.folder):
            (comparison.folder / "comparison.yaml").write_text(comparison.to_yaml(), encoding="utf-8")
        return Runner(comparison, runs, lock).work()


class Runner:
    """Starts runs, watches them, and says how far they are."""

    def __init__(self, comparison: Comparison, runs: Sequence[PlannedRun], lock: int) -> None:
        self.comparison, self.lock = comparison, lock
        self.complete = {run.name for run in runs if is_complete(run)}
        self.waiting = [run for run in runs if run.name not in self.complete]
        self.failed: dict[str, str] = {}
        self.children: list[Child] = []
        self.pace = Pace(runs, self.complete, comparison.workers)
        self.bar = tqdm(total=1.0, bar_format="{desc}", disable=None, leave=False)
        self.announced = False
        self.shown = 0.0

    def work(self) -> dict[str, str]:
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
        log = self.comparison.folder / "logs" / f"{run.name}.log"
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.comparison.workers > 1 else {}
        with writing(log), log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "hapo_lite.compare.child"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | threads,
                # Ctrl-C reaches this process alone, which passes it on. The lock is theirs too: they may outlive it.
                start_new_session=True,
                pass_fds=(self.lock,),
            )
        with contextlib.suppress(BrokenPipeError):  # It ended at once; its log says why.
            process.stdin.write(json.dumps(run.recipe.model_dump(mode="json")).encode() + b"\n")
            process.stdin.flush()
        self.pace.begin(run)
        return Child(run, process, log)

    def ended(self, child: Child) -> bool:
        """Whether a run has ended; then what came of it is noted and said."""
        code = child.process.poll()
        if code is None:
            return False
        child.process.stdin.close()
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
        """The line with the time left; and once, when a run has gone a tenth of its way, a sentence that stays."""
        if time.monotonic() - self.shown < SHOW_S:
            return
        self.shown = time.monotonic()
        if not self.announced and (estimate := self.pace.first_estimate()):
            self.announced = True
            self.say(estimate)
        going = ", ".join(f"{c.run.name} {100 * self.pace.fraction(c.run):.0f} %" for c in self.children)
        self.bar.set_description_str(
            f"{len(self.complete)} of {self.pace.count} runs, {going}; {self.pace.left_in_words()}"
        )

    def say(self, sentence: str) -> None:
        # Above the line that is drawn, and flushed: it may be read from a file while the runs go on.
        with tqdm.external_write_mode():
            print(sentence, flush=True)

    def stop(self) -> None:
        """Have the runs save and end."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.process.wait()
            child.process.stdin.close()


def is_complete(run: PlannedRun) -> bool:
    """Whether the run, under this recipe, has its tokens (or iterations) and has written everything."""
    folder = RunFolder(run.recipe.run_dir)
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        training = run.recipe.training
        enough = summary["sampled_tokens"] >= training.max_tokens or summary["iterations"] >= training.iterations
        return enough and changed_setting(folder, run.recipe) is None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False


def outcome(run: PlannedRun) -> str:
    """First and last held-out accuracy of a complete run."""
    found = [x["eval/accuracy"] for x in RunFolder(run.recipe.run_dir).metrics.read() if "eval/accuracy" in x]
    return f"held-out accuracy {found[0]:.3f} -> {found[-1]:.3f}" if found else "complete"


def failure(log: Path, code: int) -> str:
    """Why a run ended: its own sentence, or the last thing it printed."""
    try:
        lines = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    said = errors[-1] if errors else f"{how}: {lines[-1]}" if lines else how
    return f"{said} ({log})"


def check_machine(workers: int) -> None:
    """Refuse several runs at a time where they would share a GPU, and a launcher that starts several of us."""
    if workers > 1 and torch.cuda.is_available():
        raise UserError(f"workers = {workers}: on a GPU runs go one after another, since each wants all of its memory")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a comparison starts its runs itself: call it without accelerate launch or torchrun")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the comparison's folder, this process and its runs. Raises UserError if another one does not let go.

    Runs inherit the lock and keep it until the last of them has ended. The package filelock would end it with
    this process.
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
