"""In ten minutes on a card: what the README's table "What has run where" still lacks, as JSON and Markdown.

    python benchmarks/gpu.py                       # Qwen2.5-1.5B's shape with random weights
    python benchmarks/gpu.py --shapes small        # a model of 4 layers, without a GPU too
    python benchmarks/gpu.py --parts engines head  # some parts; those that are done are not done again

Each part runs in a process of its own and leaves FOLDER/NAME.json. The same command goes on with the parts that are
missing, failed, or were measured with another state of the kit or on another machine. At the end FOLDER/gpu.json and
FOLDER/gpu.md have all of them. A part that needs more than the minutes that are left is ended, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_parts  # noqa: E402
from benchmarks.gpu_parts import DEVICE, LOADS, Figures, Place  # noqa: E402
from hapo_lite.cli import keep_freed_memory, quiet_libraries, use_expandable_segments  # noqa: E402
from hapo_lite.train.memory.room import usable  # noqa: E402

GIB = 2**30
PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate", "triton", "trl", "liger-kernel", "vllm", "unsloth")


class Part(NamedTuple):
    """rows: the rows of the README's table "What has run where" that the part is for, as they begin there."""

    work: Callable[[Place], Figures]
    rows: tuple[str, ...]


PARTS = {
    "training": Part(gpu_parts.measure_training, ("Preflight",)),
    "engines": Part(
        gpu_parts.measure_engines, ("Engine `transformers`", "Engine `paged`", "Engine `vllm`", "Engine `unsloth`")
    ),
    "head": Part(gpu_parts.measure_head, ("The head",)),
    "tiny": Part(gpu_parts.train_tiny, ("Training, `tiny_cpu.yaml`",)),
    "commands": Part(gpu_parts.run_commands, ("Probe and curricula", "Evaluation suites", "Export", "Inspector")),
    "fp16": Part(gpu_parts.measure_fp16, ("fp16 with loss scaling",)),
    "paged": Part(gpu_parts.measure_paged, ("Same bytes twice",)),
    "shortage": Part(gpu_parts.measure_shortage, ("Memory that runs out",)),
    "resume": Part(gpu_parts.verify_resume, ("Same bytes twice",)),
}


def kit() -> str:
    """The kit's commit, with the hash of what has changed since; without git, the hash of its sources."""
    try:
        commit, changes, new = (
            subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("diff", "HEAD"),
                ("ls-files", "--others", "--exclude-standard"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        sources = sorted(path for folder in ("hapo_lite", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
        return f"without a commit, sources {digest(path.read_bytes() for path in sources)}"
    name = commit.decode().strip()
    added = [ROOT / line for line in new.decode().splitlines() if line.endswith(".py")]
    if changes or added:
        name += f" with changes {digest([changes, *(path.read_bytes() for path in added)])}"
    return name


def digest(pieces: Iterable[bytes]) -> str:
    """Eight digits that differ where the pieces do."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(hashlib.sha256(piece).digest())
    return found.hexdigest()[:8]


def machine() -> dict[str, str]:
    """What the figures depend on: the kit, card, driver and versions."""
    found = {
        "kit": kit(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    if DEVICE == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["card"] = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / GIB:.1f} GiB"
        found["usable for tensors, assumed"] = f"{usable(card.total_memory) / GIB:.2f} GiB"
        found["CUDA"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_part(name: str, place: Place, seconds: float) -> str | None:
    """Run a part in a process of its own. Returns why it left nothing, or None."""
    command = [sys.executable, __file__, "--shapes", place.shape, "--folder", str(place.folder), "--part", name]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        return "the minutes were over"
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)  # with the runs that it started
            child.wait()
    return None if code == 0 else f"it ended with exit code {code}"


def is_done(path: Path, about: dict[str, str]) -> bool:
    """Whether a part's file is there, and this kit made it on this machine."""
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["machine"] == about


def page(results: dict[str, Any], about: dict[str, str], shape: str) -> str:
    """The Markdown page of all parts. results: by part, its figures or the reason why there are none."""
    lines = [f"# Figures of {about.get('card', 'a CPU')}", "", f"Shape {shape}, random weights where it is not `tiny`."]
    lines += ["", ", ".join(f"{key} {value}" for key, value in about.items() if key != "card") + "."]
    for name, figures in results.items():
        lines += ["", f"## {name}: {'; '.join(PARTS[name].rows)}", ""]
        if isinstance(figures, str):
            lines.append(f"Left out: {figures}.")
            continue
        lines += ["| figure | |", "|---|---|"]
        lines += [
            f"| {label} | {value if isinstance(value, str) else f'{value:,.4g}'} |" for label, value in figures.items()
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=LOADS, default="1.5b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu_benchmark"), help="results, and the model")
    parser.add_argument("--minutes", type=float, default=10.0, help="most that all parts may take together")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    use_expandable_segments()  # for the parts, which are processes of their own
    place = Place(args.shapes, args.folder.absolute() / args.shapes if args.part is None else args.folder)
    about = machine()
    if args.part:
        keep_freed_memory()
        quiet_libraries()
        started = time.perf_counter()
        figures = PARTS[args.part].work(place)
        record = {"machine": about, "seconds": time.perf_counter() - started, "figures": figures}
        (place.folder / f"{args.part}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    over = time.perf_counter() + 60 * args.minutes
    results: dict[str, Any] = {}
    for name in PARTS:
        path = place.folder / f"{name}.json"
        problem: str | None = "not asked for"
        if not is_done(path, about) and name in args.parts:
            print(f"== {name}: {'; '.join(PARTS[name].rows)}", flush=True)
            problem = run_part(name, place, max(over - time.perf_counter(), 1.0))
        done = is_done(path, about)
        results[name] = json.loads(path.read_text(encoding="utf-8"))["figures"] if done else problem
    text = page(results, about, args.shapes)
    (place.folder / "gpu.json").write_text(json.dumps({"machine": about, "parts": results}, indent=1), encoding="utf-8")
    (place.folder / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
