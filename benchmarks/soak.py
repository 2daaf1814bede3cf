"""Does anything grow? Runs the bundled recipe for many iterations and watches its memory, files, processes and pace.

`python benchmarks/soak.py [--iterations 500] [section.key=value ...]`. The run is a process of its own, looked at from
outside at the end of each iteration. Memory is what the run and the processes that it started have resident.
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
    """After an iteration. own, all: resident memory of the run, and with its children, MiB. files: open handles."""

    iteration: int
    own: float
    all: float
    files: int
    processes: int
    threads: int


def watch(folder: Path, iterations: int, overrides: list[str]) -> tuple[list[Sample], list[float], list[float]]:
    """Run, and return for each iteration a sample, its seconds, and its seconds by 1,000 tokens."""
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
    return samples, seconds, [1000.0 * s / tokens for s, tokens in zip(seconds, lengths, strict=True)]


def look(run: psutil.Process, iteration: int) -> Sample:
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
        samples, seconds, paces = watch(Path(folder), arguments.iterations, arguments.overrides)
    fifth = arguments.iterations // 5
    late = [s for s in samples if s.iteration > fifth]
    print(f"{arguments.iterations} iterations, {len(samples)} samples; the first {fifth} are left to settle")
    for name in ("own", "all"):
        values = [getattr(s, name) for s in late]
        who = "the run's memory" if name == "own" else "with its graders'"
        print(f"{who:<20}{values[0]:8.1f} -> {values[-1]:8.1f} MiB   {slope(values):+.3f} MiB per 100 iterations")
    for name in ("files", "processes", "threads"):
        values = [getattr(s, name) for s in late]
        print(f"{name:<20}{values[0]:8} -> {values[-1]:8}       {min(values)} to {max(values)}")
    # A policy that learns to be brief has shorter iterations, so its pace is that by token.
    for name, numbers in (("an iteration", seconds), ("by 1,000 tokens", paces)):
        first, last = (float(np.median(part)) for part in (numbers[:fifth], numbers[-fifth:]))
        print(f"{'seconds':<20}{first:8.3f} -> {last:8.3f} {name:<16}{100 * (last / first - 1):+.1f} % (medians)")


if __name__ == "__main__":
    main()
