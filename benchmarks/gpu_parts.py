"""The parts of benchmarks/gpu.py: each measures something on the card, and gives its figures by name."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, head, memory
from hapo_lite.errors import UserError, first_line
from hapo_lite.head.tiles import fold_kernel
from hapo_lite.model.load import load_policy
from hapo_lite.preflight.measure import measure_loop, prepare
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.runs.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from hapo_lite.train.memory.predict import Predictor
from hapo_lite.train.optimizer import loss_scale
from hapo_lite.verify_resume.verify import ResumeDiffers

ROOT = Path(__file__).parents[1]
MIB = 2**20
TINY = "recipes/tiny_cpu.yaml"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    def runs(self) -> Path:
        """The folder with the run of the part `tiny`."""
        return self.folder / "runs"

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
        if measured:  # On a CPU the process may have had the memory before.
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
    names = ["plain", "generate", "transformers", "paged"]
    speeds = engine_speeds(names, recipe, policy, place.load.repeats)
    for name in names:
        figures[f"{name}: tokens/s"] = statistics.median(speeds.tokens_per_s[name])
        if name != "plain":
            figures[f"{name} / plain"] = speeds.ratio(name, "plain")
    figures |= recorded_steps(recipe, policy, place.load.repeats)
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


def recorded_steps(recipe: Recipe, policy: Any, repeats: int) -> Figures:
    """The steps of `transformers` as recorded CUDA graphs, beside the same steps as they are.

    A card that refuses to record leaves its reason as a figure, so that the other engines' figures stay.
    """
    figures: Figures = {"recorded: steps": "CUDA graphs" if DEVICE == "cuda" else "not recorded without a card"}
    try:
        found = engine_speeds(["transformers", "recorded"], recipe, policy, repeats)
    except RuntimeError as error:
        return figures | {"recorded: tokens/s": first_line(error)}
    figures["recorded: tokens/s"] = statistics.median(found.tokens_per_s["recorded"])
    figures["recorded / transformers"] = found.ratio("recorded", "transformers")
    written = found.written["recorded"]
    figures["recorded: completions that differ"] = len(written) - found.same("recorded", "transformers")
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
    """An iteration on a card with less memory than its micro-batches need.

    The base stays packed: a copy of it would be given up first, and then the rest might fit.
    """
    if DEVICE == "cpu":
        return {"skipped": "the limit is one of torch's allocator for a GPU"}
    packed = "rollout.unpacked_base=never"
    recipe = place.recipe(packed)
    predictor = Predictor(recipe, DEVICE)
    one = predictor.stages(place.recipe(packed, "training.micro_batch_tokens=1"))[2].total
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
    shutil.rmtree(place.runs, ignore_errors=True)  # an interrupted run would go on, and take less time
    command = ["hapo_lite.train", TINY, f"output_dir={place.runs}", "logging.progress=false"]
    if DEVICE == "cpu":
        command += ["training.iterations=3", "evaluation.samples=1", "evaluation.prompts=8"]
    code, seconds = run_module(command)
    if code:
        raise RuntimeError(f"the run ended with exit code {code}")
    summary = json.loads((place.runs / "tiny_cpu" / "summary.json").read_text(encoding="utf-8"))
    return {"seconds of the run": seconds, "verdict": summary["verdict"]["sentence"]}


def run_commands(place: Place) -> Figures:
    """What is done with a trained adapter, each in a process of its own: the exit code and the seconds.

    Raises UserError if the part `tiny` has left no adapter.
    """
    run = place.runs / "tiny_cpu"
    if not (run / "adapter").is_dir():
        raise UserError(f"there is no adapter in {run}: the part tiny has to come first")
    for name in ("probe", "evaluations", "export"):
        shutil.rmtree(run / name, ignore_errors=True)  # the commands would go on, and take less time
    few = "32" if DEVICE == "cpu" else "256"
    sampled = [TINY, f"output_dir={place.runs}", "logging.progress=false"]
    commands = {
        "probe": ["hapo_lite.probe", *sampled, f"data.limit={few}", "-k", "4", "--adapter", str(run)],
        "evaluate": ["hapo_lite.evaluate", *sampled, f"benchmark.limit={few}", "benchmark.samples=2"],
        "export": ["hapo_lite.export", str(run), "--to", "merged"],
        "inspector, generation": ["benchmarks.gpu_inspector", "generate", str(run)],
        "inspector, fork": ["benchmarks.gpu_inspector", "fork", str(run)],
    }
    figures: Figures = {}
    for name, command in commands.items():
        figures[f"{name}: exit code"], figures[f"{name}: seconds"] = run_module(command)
    return figures


def run_module(command: Sequence[str]) -> tuple[int, float]:
    """Run `python -m COMMAND`. Returns its exit code and its seconds."""
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
    return code, time.perf_counter() - started


def verify_resume(place: Place) -> Figures:
    """Kills, and whether the results are those of a run that nobody killed. Raises RuntimeError if nobody knows."""
    kills = 1 if DEVICE == "cpu" else 4
    settings = ["training.iterations=4", "checkpoint.every=2", "evaluation.prompts=0"]
    settings += ["rollout.prompts_per_iteration=4", "rollout.completions_per_prompt=4"]
    code, _ = run_module(["hapo_lite.verify_resume", TINY, "--kills", str(kills), *settings])
    if code not in (0, ResumeDiffers.exit_code):
        raise RuntimeError(f"whether the bytes are the same could not be checked: exit code {code}")
    return {"kills": kills, "the resumed run's bytes": "differ" if code else "are the same"}
