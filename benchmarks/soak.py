"""Does anything grow? Runs the bundled recipe for many iterations and watches its memory, files, processes and pace.

`python benchmarks/soak.py [--iterations 500] [section.key=value ...]`. The run is a process of its own, sampled
from outside at the end of each iteration. Memory is the resident memory of the run and of the processes it started.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sample:
    """The run after an iteration. own, all: resident memory without and with its children, MiB; files: open handles."""

    iteration: int
    own: float
    all: float
    files: int
    processes: int
    threads: int


@dataclass(frozen=True)
class Watched:
    """A finished run. seconds, paces: of each iteration, whole and per 1,000 tokens."""

    samples: list[Sample]
    seconds: list[float]
    paces: list[float]


def watch(folder: Path, iterations: int, overrides: list[str]) -> Watched:
    """Run the recipe and sample the run after each iteration."""
    command = [sys.executable, "-m", "hapo_lite.train", str(ROOT / "recipes" / "tiny_cpu.yaml")]
    settings = [f"output_dir={folder}", f"training.iterations={iterations}", "logging.progress=false"]
    samples: list[Sample] = []
    metrics = folder / "tiny_cpu" / "metrics.jsonl"
    run = psutil.Popen([*command, *settings, *overrides], cwd=ROOT, stdout=subprocess.DEVNULL)
    while run.poll() is None:
        lines = metrics.read_bytes().count(b"\n") - 1 if metrics.is_file() else 0
        if lines > (samples[-1].iteration if samples else 0):
            try:
                samples.append(look(run, lines))
            except psutil.NoSuchProcess:
                break
        time.sleep(0.05)
    if run.wait():
        sys.exit(f"the run ended with code {run.returncode}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    lengths = np.diff([line.get("tokens", 0) for line in records])
    seconds = [line["seconds/iteration"] for line in records[1:]]
    return Watched(samples, seconds, [1000.0 * s / tokens for s, tokens in zip(seconds, lengths, strict=True)])


def look(run: psutil.Process, iteration: int) -> Sample:
    """Sample the run."""
    children = run.children(recursive=True)
    own = run.memory_info().rss / 2**20
    return Sample(
        iteration,
        own,
        own + sum(child.memory_info().rss for child in children) / 2**20,
        run.num_fds(),
        1 + len(children),
        run.num_threads(),
    )


def slope(values: list[float]) -> float:
    """Least-squares growth per 100 iterations."""
    return 100.0 * float(np.polyfit(np.arange(len(values)), values, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watched = watch(Path(folder), arguments.iterations, arguments.overrides)
    fifth = arguments.iterations // 5
    late = [sample for sample in watched.samples if sample.iteration > fifth]
    print(f"{arguments.iterations} iterations, {len(watched.samples)} samples; the first {fifth} are left to settle")
    memory = {"the run's memory": [s.own for s in late], "with its graders'": [s.all for s in late]}
    for name, mib in memory.items():
        print(f"{name:<20}{mib[0]:8.1f} -> {mib[-1]:8.1f} MiB   {slope(mib):+.3f} MiB per 100 iterations")
    counts = {
        "files": [s.files for s in late],
        "processes": [s.processes for s in late],
        "threads": [s.threads for s in late],
    }
    for name, found in counts.items():
        print(f"{name:<20}{found[0]:8} -> {found[-1]:8}       {min(found)} to {max(found)}")
    # A policy that learns to be brief has shorter iterations: the pace per token shows whether the run slows down.
    for name, numbers in (("an iteration", watched.seconds), ("by 1,000 tokens", watched.paces)):
        first, last = (float(np.median(part)) for part in (numbers[:fifth], numbers[-fifth:]))
        print(f"{'seconds':<20}{first:8.3f} -> {last:8.3f} {name:<16}{100 * (last / first - 1):+.1f} % (medians)")


if __name__ == "__main__":
    main()
