"""In ten minutes on a card: what the README's table "What has run where" still lacks, as JSON and Markdown.

    python benchmarks/gpu.py                       # Qwen2.5-1.5B's shape with random weights
    python benchmarks/gpu.py --shapes small        # a model of 4 layers, without a GPU too
    python benchmarks/gpu.py --parts engines head  # some parts; those that are done are not done again

Each part runs in a process of its own and leaves FOLDER/NAME.json. The same command goes on with the parts that are
missing, failed, or were measured on another machine. At the end FOLDER/gpu.json and FOLDER/gpu.md have all of them. A
part that needs more than the minutes that are left is ended, and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import engines, head, memory  # noqa: E402
from hapo_lite.cli import keep_freed_memory, quiet_libraries, use_expandable_segments  # noqa: E402
from hapo_lite.errors import UserError, first_line  # noqa: E402
from hapo_lite.head.tiles import fold_kernel  # noqa: E402
from hapo_lite.model.load import load_policy  # noqa: E402
from hapo_lite.preflight.measure import measure_loop, prepare  # noqa: E402
from hapo_lite.recipe import Recipe, load_recipe  # noqa: E402
from hapo_lite.runs.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint  # noqa: E402
from hapo_lite.train.memory.predict import Predictor  # noqa: E402
from hapo_lite.train.memory.room import usable  # noqa: E402
from hapo_lite.train.optimizer import loss_scale  # noqa: E402

MIB, GIB = 2**20, 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate", "triton", "trl", "liger-kernel", "vllm", "unsloth")
Figures = dict[str, Any]
"""What a part found: a number or a word by its name."""


@dataclass(frozen=True)
class Load:
    """What is measured of a shape. sampling: the completions that engines write. repeats: turns and pairs."""

    training: memory.Work
    sampling: memory.Work
    head: tuple[head.Shape, ...]
    repeats: int


LOADS = {
    "small": Load(
        memory.Work(completions=16, new=32, prompt=32),
        memory.Work(completions=16, new=32, prompt=64),
        (head.Shape(128, 256, 8192, "float32"),),
        repeats=1,
    ),
    "1.5b": Load(
        memory.Work(completions=64, new=256, prompt=128),
        memory.Work(completions=64, new=128, prompt=128),
        tuple(head.Shape(2048, *head.MODELS["Qwen2.5-Math-1.5B"], dtype) for dtype in ("bfloat16", "float32")),
        repeats=2,
    ),
}


@dataclass(frozen=True)
class Place:
    """shape: a key of LOADS and of `memory.SHAPES`. folder: results, and the model of that shape."""

    shape: str
    folder: Path

    @property
    def load(self) -> Load:
        return LOADS[self.shape]

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe of a training measurement."""
        return memory.recipe_for(memory.write_model(self.folder, self.shape), self.load.training, overrides)


def measure_training(place: Place) -> Figures:
    found = memory.measure_training(place.recipe(), place.load.repeats)
    figures: Figures = {}
    for stage in found.stages:
        name, measured = stage.name, found.measured.allocated[stage.name]
        figures[f"{name}: predicted, MiB"] = stage.total / MIB
        figures[f"{name}: measured, MiB"] = measured / MIB
        figures[f"{name}: predicted / measured"] = stage.total / measured
        if found.measured.reserved is not None:
            figures[f"{name}: reserved by torch / measured"] = found.measured.reserved[name] / measured
        figures[f"{name}: seconds an iteration"] = found.measured.seconds[name]
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        figures["held beside torch's allocator, MiB"] = (total - free - torch.cuda.memory_reserved()) / MIB
    for method, seconds in found.methods.items():
        figures[f"{method}: seconds an iteration"] = statistics.median(seconds)
    figures["hapo / dapo"] = memory.hapo_by_dapo(found.methods)
    return figures


def measure_engines(place: Place) -> Figures:
    work = place.load.sampling
    model = memory.write_model(place.folder, place.shape)
    recipe = load_recipe(
        ROOT / "recipes" / "tiny_cpu.yaml",
        [
            f"model.name={model}",
            "model.dtype=auto",
            f"rollout.prompts_per_iteration={work.completions // 8}",
            "rollout.completions_per_prompt=8",
            f"rollout.batch_size={work.completions}",
            f"rollout.max_new_tokens={work.new}",
            f"data.max_prompt_tokens={work.prompt}",
        ],
    )
    figures: Figures = {}
    policy = load_policy(recipe.model, recipe.seed, DEVICE)  # random weights hardly ever stop
    speeds = engine_speeds(["generate", "transformers", "paged"], recipe, policy, place.load.repeats)
    for name in speeds.tokens_per_s:
        figures[f"{name}: tokens/s"] = statistics.median(speeds.tokens_per_s[name])
        figures[f"{name} / generate"] = speeds.ratio(name, "generate")
    for name in ("vllm", "unsloth"):
        if importlib.util.find_spec(name) is None:
            figures[f"{name}: tokens/s"] = "not installed"
            continue
        try:
            theirs = load_policy(recipe.model, recipe.seed, DEVICE, engine="unsloth") if name == "unsloth" else policy
            found = engine_speeds([name], recipe, theirs, place.load.repeats)
            figures[f"{name}: tokens/s"] = statistics.median(found.tokens_per_s[name])
        except (UserError, RuntimeError) as error:
            figures[f"{name}: tokens/s"] = first_line(error)
    return figures


def engine_speeds(names: list[str], recipe: Recipe, policy: Any, repeats: int) -> engines.Speeds:
    """The speeds of engines on one policy, in turn."""
    made = {name: engines.engine(name, recipe, policy) for name in names}
    return engines.measure(made, engines.requests_of(recipe, policy), recipe.seed, repeats)


def measure_head(place: Place) -> Figures:
    figures: Figures = {"Triton's kernel": "used" if fold_kernel(DEVICE) else "not used"}
    for shape in place.load.head:
        label = f"{shape.tokens} x {shape.hidden} x {shape.vocabulary:,}, {shape.dtype}"
        figures |= {f"{name}: ms, {label}": 1000 * seconds for name, seconds in head.times(shape).items()}
        figures |= {f"{name}: MiB at the peak, {label}": peak for name, peak in head.peaks(shape).items()}
    return figures


def measure_fp16(place: Place) -> Figures:
    if DEVICE == "cpu":
        return {"skipped": "model.dtype=fp16 needs a GPU"}
    worst = prepare(place.recipe("model.dtype=fp16"))
    measured = measure_loop(worst, print)
    figures: Figures = {f"{stage}: measured, MiB": size / MIB for stage, size in measured.allocated.items()}
    line = worst.loop.step(TrainState(iteration=2)).metrics
    figures["steps skipped in the third iteration"] = line["update/skipped"]
    figures["gradient's norm"] = line.get("update/grad_norm", math.nan)
    figures["scale of the loss afterwards"] = loss_scale(worst.loop.learner.optimizer)
    return figures


def measure_paged(place: Place) -> Figures:
    """A step, a checkpoint, and a step after it is read: what a resumed run does with paged optimiser states."""
    recipe = place.recipe("training.optimizer=paged_adamw_8bit")
    loop = prepare(recipe).loop
    state = loop.step(TrainState()).state
    path = save_checkpoint(place.folder / "paged", loop.parts, state, loop.recipe)
    load_checkpoint(Checkpoint.read(path), loop.parts)
    states = [s["state1"] for s in loop.learner.optimizer.state.values()]
    figures: Figures = {"states": len(states), "of them in pages": sum(hasattr(s, "is_paged") for s in states)}
    figures["steps skipped after the checkpoint was read"] = loop.step(state).metrics["update/skipped"]
    return figures


def measure_shortage(place: Place) -> Figures:
    """An iteration on a card with less memory than its micro-batches need."""
    if DEVICE == "cpu":
        return {"skipped": "the limit is one of torch's allocator for a GPU"}
    recipe = place.recipe()
    predictor = Predictor(recipe, DEVICE)
    one = predictor.stages(place.recipe("training.micro_batch_tokens=1"))[2].total
    all_at_once = predictor.stages(recipe)[2].total
    worst = prepare(recipe)
    torch.cuda.empty_cache()
    card = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((one + all_at_once) / 2 / card)
    line = worst.loop.step(TrainState()).metrics
    figures: Figures = {"shortages": line["memory/shortages"], "steps skipped": line["update/skipped"]}
    figures["rollout.batch_size that fitted"] = worst.loop.collector.engine.batch_size
    figures["training.micro_batch_tokens that fitted"] = worst.loop.token_limit
    return figures


def train_tiny(place: Place) -> Figures:
    """The bundled recipe as `make train` runs it; without a GPU three iterations of it."""
    runs = place.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # an interrupted run would go on, and take less time
    command = ["hapo_lite.train", "recipes/tiny_cpu.yaml", f"output_dir={runs}", "logging.progress=false"]
    if DEVICE == "cpu":
        command += ["training.iterations=3", "evaluation.samples=1", "evaluation.prompts=8"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=ROOT)
    summary = json.loads((runs / "tiny_cpu" / "summary.json").read_text(encoding="utf-8"))
    return {"seconds of the run": time.perf_counter() - started, "verdict": summary["verdict"]["sentence"]}


def verify_resume(place: Place) -> Figures:
    kills = 1 if DEVICE == "cpu" else 4
    settings = ["training.iterations=4", "checkpoint.every=2", "evaluation.prompts=0"]
    settings += ["rollout.prompts_per_iteration=4", "rollout.completions_per_prompt=4"]
    command = ["hapo_lite.verify_resume", "recipes/tiny_cpu.yaml", "--kills", str(kills), *settings]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT)
    return {"kills": kills, "the resumed run's bytes": "differ" if done.returncode else "are the same"}


class Part(NamedTuple):
    """rows: those of the README's table that the part is for."""

    work: Callable[[Place], Figures]
    rows: str


PARTS = {
    "training": Part(measure_training, "Preflight; HAPO beside DAPO; peak memory"),
    "engines": Part(measure_engines, "Engines `transformers`, `paged`, `vllm`, `unsloth`"),
    "head": Part(measure_head, "The head"),
    "tiny": Part(train_tiny, "Training, `tiny_cpu.yaml`"),
    "fp16": Part(measure_fp16, "fp16 with loss scaling"),
    "paged": Part(measure_paged, "Same bytes twice: paged optimiser states"),
    "shortage": Part(measure_shortage, "Memory that runs out"),
    "resume": Part(verify_resume, "Same bytes twice, and after `kill -9`"),
}


def machine() -> dict[str, str]:
    """What the figures depend on: card, driver and versions."""
    found = {"machine": platform.machine(), "torch": torch.__version__, "threads": str(torch.get_num_threads())}
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
    """Whether a part's file is there and of this machine."""
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["machine"] == about


def page(results: dict[str, Any], about: dict[str, str], shape: str) -> str:
    """The Markdown page of all parts. results: by part, its figures or the reason why there are none."""
    lines = [f"# Figures of {about.get('card', 'a CPU')}", "", f"Shape {shape}, random weights where it is not `tiny`."]
    lines += ["", ", ".join(f"{key} {value}" for key, value in about.items() if key != "card") + "."]
    for name, figures in results.items():
        lines += ["", f"## {name}: {PARTS[name].rows}", ""]
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
            print(f"== {name}: {PARTS[name].rows}", flush=True)
            problem = run_part(name, place, max(over - time.perf_counter(), 1.0))
        done = is_done(path, about)
        results[name] = json.loads(path.read_text(encoding="utf-8"))["figures"] if done else problem
    text = page(results, about, args.shapes)
    (place.folder / "gpu.json").write_text(json.dumps({"machine": about, "parts": results}, indent=1), encoding="utf-8")
    (place.folder / "gpu.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
