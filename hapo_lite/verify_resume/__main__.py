"""Kill a run at random, resume it, and compare what it leaves with a run that nobody killed.

The recipe runs once undisturbed. Then it runs again, is killed with SIGKILL in a stage that `--seed` draws, is
resumed by the same command, killed again, and so on to its end, where it is compared; then the next one begins. The
stage is certain: the run names it in status.json, is stopped, looked at again, and killed only if it is still in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hapo_lite.cli import recipe_from, recipe_parser, run_command
from hapo_lite.errors import UserError
from hapo_lite.runs.lines import timeless
from hapo_lite.runs.status import ENDED, Doing, read_status

COMMANDS = ("train", "evaluate", "compare")
POLL_S = 0.0005
LEAVING_S = 20.0
"""How long the other processes of a killed run may take to notice, seconds."""
TRIES = 5
"""Finished runs in which a stage may have been missed before it is given up."""


@dataclass(frozen=True)
class Aim:
    """Kill `after` seconds into `stage`, once that has been entered more than `skip` times."""

    stage: str
    skip: int
    after: float

    def met_by(self, doing: Doing | None) -> bool:
        return doing is not None and doing.stage == self.stage and doing.entered[self.stage] > self.skip


@dataclass(frozen=True)
class Pace:
    """What an undisturbed run did. iterations: all of them; entered, seconds: of each stage."""

    iterations: int
    entered: dict[str, int]
    seconds: dict[str, float]


@dataclass
class Findings:
    """kills: (stage, iteration) of each. missed: runs that ended before the kill that was due in a stage.

    compared, differing: how many things, by kind. complaints: sentences about what differs or was left behind.
    """

    kills: list[tuple[str, int]] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    compared: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    parser = recipe_parser("verify_resume", __doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often it is killed (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="decides where (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run, under torchrun (default 1)")
    parser.add_argument("--command", choices=COMMANDS, default="train", help="what to run (default train)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.kills < 1 or arguments.processes < 1:
        raise UserError("--kills and --processes must be at least 1")
    settings = list(arguments.overrides)
    if arguments.command == "train":  # all prompts and completions are compared, so all of them are recorded
        rollout = recipe_from(arguments).rollout
        everything = rollout.prompts_per_iteration * rollout.completions_per_prompt
        settings += [f"logging.traces_per_iteration={everything}", "logging.progress=false"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.processes)]
    start = [
        sys.executable,
        *(launcher if arguments.processes > 1 else []),
        "-m",
        f"hapo_lite.{arguments.command}",
        arguments.recipe,
        *settings,
    ]
    folder = Path(tempfile.mkdtemp(prefix="hapo_lite_verify_"))
    findings = verify(start, folder, arguments.kills, arguments.seed)
    if findings.complaints:
        raise UserError(
            f"{len(findings.complaints)} things are not as they should be, the first: {findings.complaints[0]}; all "
            f"the runs are in {folder}"
        )
    shutil.rmtree(folder)


def verify(start: Sequence[str], folder: Path, kills: int, seed: int) -> Findings:
    """Run, kill, resume and compare `start`, to which output_dir is added, in folders below `folder`; print a table."""
    findings, draw = Findings(), random.Random(seed)
    whole = folder / "undisturbed"
    begun = time.perf_counter()
    run(start, whole)
    print(f"undisturbed: {time.perf_counter() - begun:.0f} s", flush=True)
    expected, pace = left_by(whole), pace_of(whole)
    while len(findings.kills) < kills:
        findings.runs += 1
        again, done = folder / f"killed-{findings.runs}", 0.0
        while True:
            aim = draw_aim(pace, findings, done, draw) if len(findings.kills) < kills else None
            doing = run(start, again, aim, findings)
            if doing is None:
                break
            findings.kills.append((doing.stage, doing.iteration))
            done = doing.iteration / pace.iterations
            print(f"kill {len(findings.kills)}: {doing.stage}, iteration {doing.iteration}", flush=True)
        if aim is not None:
            findings.missed[aim.stage] += 1
        compare(expected, left_by(again), again.name, findings)
    print(table(findings, pace))
    return findings


def pace_of(folder: Path) -> Pace:
    """The stages of a finished run, from its status.json; of a comparison, as the run was that entered a stage most.

    Raises UserError where there is none.
    """
    doings = [doing for path in status_files(folder) if (doing := read_status(path))]
    if not doings:
        raise UserError(f"the undisturbed run in {folder} left no status.json: it cannot be killed in a known stage")
    entered, seconds = {}, {}
    for doing in doings:
        for stage, times in doing.entered.items():
            if stage not in ENDED and times > entered.get(stage, 0):
                entered[stage], seconds[stage] = times, doing.seconds.get(stage, 0.0)
    return Pace(max(1, *(doing.iteration for doing in doings)), entered, seconds)


def draw_aim(pace: Pace, findings: Findings, done: float, draw: random.Random) -> Aim:
    """A stage among those that were hit least, at any moment of what is left of the run. done: share of it that is not.

    Raises UserError if a stage is missed again and again.
    """
    hits = Counter(stage for stage, _ in findings.kills)
    if missed := [stage for stage, times in findings.missed.items() if times >= TRIES and not hits[stage]]:
        raise UserError(f"the stage {missed[0]} is too short to be hit: {TRIES} runs ended before it was")
    fewest = min(hits[stage] for stage in pace.entered)
    stage = draw.choice(sorted(stage for stage in pace.entered if hits[stage] == fewest))
    entered = pace.entered[stage]
    left = max(1, round(entered * (1.0 - done)))
    return Aim(stage, draw.randrange(left), draw.uniform(0.0, pace.seconds[stage] / entered))


def run(start: Sequence[str], folder: Path, aim: Aim | None = None, findings: Findings | None = None) -> Doing | None:
    """Run `start` into `folder` to its end, and return None; or kill it at `aim`, and return what it was doing.

    Raises UserError where it fails by itself.
    """
    folder.mkdir(exist_ok=True)
    before = {doing.process for path in status_files(folder) if (doing := read_status(path))}
    log = folder / "output.txt"
    with log.open("ab") as output:
        process = psutil.Popen([*start, f"output_dir={folder}"], stdout=output, stderr=subprocess.STDOUT)
    while aim is not None and process.poll() is None:
        doing = doing_now(folder, before)
        if aim.met_by(doing):
            time.sleep(aim.after)
            if killed := kill_if_still(aim, doing.process, process, folder, before, findings):
                return killed
            aim = Aim(aim.stage, aim.skip, aim.after / 2)
        time.sleep(POLL_S)
    if process.wait() != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise UserError(f"{' '.join(start)} ended with code {process.returncode}: {lines[-1] if lines else ''} ({log})")
    return None


def kill_if_still(
    aim: Aim, main: int, process: psutil.Popen, folder: Path, before: set[int], findings: Findings
) -> Doing | None:
    """Stop the process that writes status.json, and kill the run if it is still where it should be; else let it go on.

    A run of one process loses that process, and the others that it has started must find out for themselves. A run of
    several, with its launcher, loses all of them at once.
    """
    try:
        victim = psutil.Process(main)
        victim.suspend()
        while victim.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(POLL_S)
        doing = doing_now(folder, before)
        if not aim.met_by(doing):
            victim.resume()
            return None
        started = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    for one in [process, *(process.children() if process.pid != main else [])]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=LEAVING_S)
    for one in alive:
        findings.complaints.append(f"process {one.pid} outlived the run that had started it by {LEAVING_S:.0f} s")
        one.kill()
    return doing


def status_files(folder: Path) -> list[Path]:
    """Of a run, or of the runs of a comparison."""
    return [*folder.glob("*/status.json"), *folder.glob("*/*/status.json")]


def doing_now(folder: Path, before: set[int]) -> Doing | None:
    """What the newest process that has written a status.json is doing. before: those that are dead."""
    paths = sorted(status_files(folder), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    doings = (read_status(path) for path in paths)
    return next((d for d in doings if d is not None and d.process not in before), None)


def left_by(folder: Path) -> dict[str, dict[str, Any]]:
    """Everything that must be the same however often a run was interrupted: kind -> name -> value."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for path in sorted(path for path in folder.glob("*/**/*") if path.is_file()):
        name = str(path.relative_to(folder))
        found["files"][name] = "there"
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                _take_line(found, path, f"{name}:{number}", json.loads(line))
        elif path.suffix in (".safetensors", ".pt"):
            kind = "optimiser states" if path.suffix == ".pt" else "adapters"
            found[kind][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(found)


def _take_line(found: dict[str, dict[str, Any]], path: Path, where: str, record: dict[str, Any]) -> None:
    """A line of a trace is a prompt and a completion; of an evaluation, a sample; of metrics, numbers by name."""
    if path.parent.name == "traces":
        prompt = {key: record.pop(key) for key in ("prompt_id", "messages", "gold")}
        found["prompts"][where], found["completions"][where] = prompt, record
    elif path.name != "metrics.jsonl":
        found["samples"][where] = record
    else:
        found["numbers"] |= {f"{where} {key}": value for key, value in timeless(record).items()}


def compare(expected: dict, found: dict, name: str, findings: Findings) -> None:
    """Count what differs between two results of `left_by`, and complain of the first of each kind."""
    for kind in sorted(expected.keys() | found.keys()):
        left, right = expected.get(kind, {}), found.get(kind, {})
        keys = sorted(left.keys() | right.keys())
        wrong = [key for key in keys if left.get(key) != right.get(key)]
        findings.compared[kind] += len(keys)
        findings.differing[kind] += len(wrong)
        if wrong:
            values = (str(side.get(wrong[0], "absent"))[:60] for side in (left, right))
            findings.complaints.append(f"{kind}: {name}/{wrong[0]} is {' undisturbed and '.join(values)} after kills")


def table(findings: Findings, pace: Pace) -> str:
    """How often each stage was hit, and what was compared."""
    lines = [f"\n{'stage':<18}{'kills':>8}   in iterations"]
    for stage in pace.entered:
        hit = sorted(iteration for where, iteration in findings.kills if where == stage)
        lines.append(f"{stage:<18}{len(hit):>8}   {', '.join(map(str, hit))}")
    lines.append(f"{'all':<18}{len(findings.kills):>8}   in {findings.runs} runs\n")
    lines.append(f"{'':<18}{'compared':>8}{'differing':>11}")
    lines += [f"{kind:<18}{n:>8,}{findings.differing[kind]:>11,}" for kind, n in findings.compared.items()]
    return "\n".join(lines)


def command() -> int:
    """Entry point of `hapo-verify-resume`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
