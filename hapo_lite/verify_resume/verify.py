"""Kills a run at random, resumes it, and compares its results with those of an undisturbed run.

The recipe runs once undisturbed. It then runs again, is killed with SIGKILL in a stage drawn by `--seed`, is resumed by
the same command, and so on to its end, where the results are compared. Further runs follow until all kills are done. A
kill hits its stage for certain: when status.json names the stage, the run is suspended, status.json is read again, and
the run is killed only if it is still in that stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hapo_lite.errors import UserError
from hapo_lite.runs.lines import timeless
from hapo_lite.runs.status import ENDED, Doing, read_status

COMMANDS = ("train", "sft", "probe", "evaluate", "compare")
POLL_S = 0.0005
"""Seconds between two readings of status.json."""
LEAVING_S = 20.0
"""Seconds that the other processes of a killed run may take to end by themselves."""
TRIES = 5
"""Number of finished runs that may miss a stage before verification stops."""


class ResumeDiffers(UserError):
    """A resumed run left other results than the undisturbed one. Other errors leave that open."""

    exit_code = 3


@dataclass(frozen=True)
class Aim:
    """A kill `after` seconds into `stage`, once the stage has been entered more than `skip` times."""

    stage: str
    skip: int
    after: float

    def met_by(self, doing: Doing) -> bool:
        """Whether the run is in the aimed-at stage."""
        return doing.stage == self.stage and doing.entered[self.stage] > self.skip


@dataclass(frozen=True)
class Pace:
    """The stages of an undisturbed run. iterations: their number. entered, seconds: by stage, as in `Doing`."""

    iterations: int
    entered: dict[str, int]
    seconds: dict[str, float]


@dataclass
class Findings:
    """The results so far. kills: stage and iteration of each. missed: by stage, runs that ended before a kill in it.

    runs: number of killed runs. compared, differing: number of compared values, by kind. complaints: sentences about
    values that differ and processes that were left behind.
    """

    kills: list[tuple[str, int]] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


def verify(start: Sequence[str], folder: Path, kills: int, seed: int) -> Findings:
    """Run, kill, resume and compare the command `start` in folders below `folder`, and print a table.

    `output_dir=` is added to the command. Raises UserError if a run fails, or a stage is missed again and again.
    """
    undisturbed = folder / "undisturbed"
    begun = time.perf_counter()
    Launch(start, undisturbed).to_its_end()
    print(f"undisturbed: {time.perf_counter() - begun:.0f} s", flush=True)
    expected = left_by(undisturbed)
    verification = Verification(start, kills, pace_of(undisturbed), random.Random(seed))
    findings = verification.findings
    while len(findings.kills) < kills:
        findings.runs += 1
        again = folder / f"killed-{findings.runs}"
        verification.run_with_kills(again)
        compare(expected, left_by(again), again.name, findings)
    print(table(findings, verification.pace))
    return findings


@dataclass(frozen=True)
class Verification:
    """Runs the command `start`, with `kills` kills in all. pace: of the undisturbed run. draw: draws the kills."""

    start: Sequence[str]
    kills: int
    pace: Pace
    draw: random.Random
    findings: Findings = field(default_factory=Findings)

    def run_with_kills(self, folder: Path) -> None:
        """Run the command to its end in `folder`, with kills and resumptions until all kills are done."""
        findings = self.findings
        done = 0.0
        while len(findings.kills) < self.kills:
            aim = draw_aim(self.pace, findings, done, self.draw)
            killed = Launch(self.start, folder).to_kill(aim)
            if killed is None:
                findings.missed[aim.stage] += 1
                return
            stage, iteration = killed.doing.stage, killed.doing.iteration
            findings.kills.append((stage, iteration))
            findings.complaints += killed.complaints
            done = iteration / self.pace.iterations
            print(f"kill {len(findings.kills)}: {stage}, iteration {iteration}", flush=True)
        Launch(self.start, folder).to_its_end()


def pace_of(folder: Path) -> Pace:
    """The stages of a finished run, from its status.json.

    A comparison has several runs; each stage is taken from the run that entered it most often. Raises UserError if
    there is no status.json.
    """
    doings = statuses(folder)
    if not doings:
        raise UserError(f"the undisturbed run in {folder} left no status.json: it cannot be killed in a known stage")
    entered: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for doing in doings:
        for stage, times in doing.entered.items():
            if stage not in ENDED and times > entered.get(stage, 0):
                entered[stage] = times
                seconds[stage] = doing.seconds.get(stage, 0.0)
    return Pace(max(1, *(doing.iteration for doing in doings)), entered, seconds)


def draw_aim(pace: Pace, findings: Findings, done: float, draw: random.Random) -> Aim:
    """Draw a stage among those hit least, and a moment in the rest of the run. done: fraction of the run completed.

    Raises UserError if a stage is missed again and again.
    """
    hits = Counter(stage for stage, _ in findings.kills)
    missed = [stage for stage, times in findings.missed.items() if times >= TRIES and not hits[stage]]
    if missed:
        raise UserError(f"the stage {missed[0]} is too short to be hit: {TRIES} runs ended before it was")
    fewest = min(hits[stage] for stage in pace.entered)
    stage = draw.choice(sorted(stage for stage in pace.entered if hits[stage] == fewest))
    entered = pace.entered[stage]
    left = max(1, round(entered * (1.0 - done)))
    return Aim(stage, draw.randrange(left), draw.uniform(0.0, pace.seconds[stage] / entered))


@dataclass(frozen=True)
class Killed:
    """A run that was killed. doing: what it was doing. complaints: sentences about processes that outlived it."""

    doing: Doing
    complaints: list[str]


class Launch:
    """A process of the command `start`, which writes into `folder`. It begins at once."""

    def __init__(self, start: Sequence[str], folder: Path) -> None:
        self.start = start
        self.folder = folder
        self.log = folder / "output.txt"
        folder.mkdir(exist_ok=True)
        self._dead = {doing.process for doing in statuses(folder)}
        with self.log.open("ab") as output:
            self.process = psutil.Popen([*start, f"output_dir={folder}"], stdout=output, stderr=subprocess.STDOUT)

    def to_its_end(self) -> None:
        """Wait for the end. Raises UserError if the command fails."""
        if self.process.wait() != 0:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else ""
            raise UserError(f"{' '.join(self.start)} ended with code {self.process.returncode}: {last} ({self.log})")

    def to_kill(self, aim: Aim) -> Killed | None:
        """Kill the run at `aim`; None if it ends before. Raises UserError if the command fails by itself."""
        while self.process.poll() is None:
            doing = self.doing()
            if doing is not None and aim.met_by(doing):
                time.sleep(aim.after)
                killed = self.kill_if_still(aim, doing.process)
                if killed is not None:
                    return killed
                aim = Aim(aim.stage, aim.skip, aim.after / 2)
            time.sleep(POLL_S)
        self.to_its_end()
        return None

    def kill_if_still(self, aim: Aim, main: int) -> Killed | None:
        """Suspend the process `main`, which writes status.json, and kill the run if it is still at `aim`.

        Otherwise the process goes on, and the result is None. A run of one process loses that process, and the
        processes it has started must end by themselves. A run of several processes loses all of them and its launcher
        at once.
        """
        try:
            victim = psutil.Process(main)
            victim.suspend()
            while victim.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                time.sleep(POLL_S)
            doing = self.doing()
            if doing is None or not aim.met_by(doing):
                victim.resume()
                return None
            started = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return None
        victims: list[psutil.Process] = [self.process]
        if self.process.pid != main:
            victims += self.process.children()
        for one in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(started, timeout=LEAVING_S)
        complaints = []
        for one in alive:
            complaints.append(f"process {one.pid} outlived the run that had started it by {LEAVING_S:.0f} s")
            one.kill()
        return Killed(doing, complaints)

    def doing(self) -> Doing | None:
        """What the newest process that has written a status.json is doing; None before this launch has written one."""
        paths = sorted(status_files(self.folder), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        doings = (read_status(path) for path in paths)
        return next((d for d in doings if d is not None and d.process not in self._dead), None)


def status_files(folder: Path) -> list[Path]:
    """The status.json of a run, or of the runs of a comparison, below `folder`."""
    return [*folder.glob("*/status.json"), *folder.glob("*/*/status.json")]


def statuses(folder: Path) -> list[Doing]:
    """The readable ones among `status_files`."""
    doings = (read_status(path) for path in status_files(folder))
    return [doing for doing in doings if doing is not None]


Results = dict[str, dict[str, Any]]
"""Results of a run: kind -> name -> value."""


def left_by(folder: Path) -> Results:
    """The results in `folder` that must be the same however often a run was interrupted."""
    found: Results = defaultdict(dict)
    for path in sorted(path for path in folder.glob("*/**/*") if path.is_file()):
        name = str(path.relative_to(folder))
        found["files"][name] = "there"
        if path.suffix == ".jsonl":
            # As bytes, since text also has lines end at characters that a completion may hold, such as U+2028.
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                for kind, values in _line_results(path, f"{name}:{number}", json.loads(line)).items():
                    found[kind] |= values
        elif path.suffix in (".safetensors", ".pt"):
            kind = "optimiser states" if path.suffix == ".pt" else "adapters"
            found[kind][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(found)


def _line_results(path: Path, where: str, record: dict[str, Any]) -> Results:
    """The results on one line: a prompt and a completion of a trace, numbers of metrics.jsonl, else a sample."""
    if path.parent.name == "traces":
        prompt = {key: record.pop(key) for key in ("prompt_id", "messages", "gold")}
        return {"prompts": {where: prompt}, "completions": {where: record}}
    if path.name == "metrics.jsonl":
        return {"numbers": {f"{where} {key}": value for key, value in timeless(record).items()}}
    return {"samples": {where: record}}


def compare(expected: Results, found: Results, name: str, findings: Findings) -> None:
    """Count in `findings` the values that differ between two results, and complain about the first of each kind.

    name: of the run with the results `found`.
    """
    for kind in sorted(expected.keys() | found.keys()):
        left, right = expected.get(kind, {}), found.get(kind, {})
        keys = sorted(left.keys() | right.keys())
        wrong = [key for key in keys if left.get(key) != right.get(key)]
        findings.compared[kind] += len(keys)
        findings.differing[kind] += len(wrong)
        if wrong:
            undisturbed, killed = (str(side.get(wrong[0], "absent"))[:60] for side in (left, right))
            findings.complaints.append(
                f"{kind}: {name}/{wrong[0]} is {undisturbed} undisturbed and {killed} after kills"
            )


def table(findings: Findings, pace: Pace) -> str:
    """The number of kills in each stage, and of compared and differing values of each kind, as text."""
    lines = [f"\n{'stage':<18}{'kills':>8}   in iterations"]
    for stage in pace.entered:
        hit = sorted(iteration for where, iteration in findings.kills if where == stage)
        lines.append(f"{stage:<18}{len(hit):>8}   {', '.join(map(str, hit))}")
    lines.append(f"{'all':<18}{len(findings.kills):>8}   in {findings.runs} runs\n")
    lines.append(f"{'':<18}{'compared':>8}{'differing':>11}")
    lines += [f"{kind:<18}{n:>8,}{findings.differing[kind]:>11,}" for kind, n in findings.compared.items()]
    return "\n".join(lines)
