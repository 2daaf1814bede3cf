"""Peak memory and seconds by stage at true shapes with random weights, beside the prediction; HAPO beside DAPO.

    python benchmarks/memory.py [section.key=value ...] [--shapes 1.5b 7b] [--completions 64] [--new 1024]
        [--prompt 256] [--pairs 4]

Training has a 4-bit base, LoRA of rank 32, gradient checkpointing, 8-bit AdamW, groups of 8 and micro-batches of 4
sequences. The model is written once to --folder and read like any other. Without a GPU use --shapes small. HAPO and
DAPO take turns on the same model; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import QWEN_1_5B, QWEN_7B, Shape  # noqa: E402
from hapo_lite.algo.methods import PRESETS  # noqa: E402
from hapo_lite.cli import keep_freed_memory, quiet_libraries  # noqa: E402
from hapo_lite.model.origins import TINY_MODEL  # noqa: E402
from hapo_lite.preflight.measure import Measured, measure_loop, prepare  # noqa: E402
from hapo_lite.preflight.table import memory_table  # noqa: E402
from hapo_lite.recipe import Recipe, load_recipe  # noqa: E402
from hapo_lite.runs.checkpoint import TrainState  # noqa: E402
from hapo_lite.train.loop import Loop  # noqa: E402
from hapo_lite.train.memory.predict import Predictor, Stage  # noqa: E402
from hapo_lite.train.memory.room import room_of  # noqa: E402

SHAPES = {
    "small": Shape(layers=4, hidden=256, heads=4, key_heads=2, inner=704, vocabulary=8192),
    "1.5b": QWEN_1_5B,
    "7b": QWEN_7B,
}


def write_model(folder: Path, name: str) -> Path:
    """The folder of a model of that shape, which is written unless it is there."""
    path = folder / name
    if not (path / "config.json").is_file():
        config = SHAPES[name].config(dtype="bfloat16")
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
        AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(path)
    return path


@dataclass(frozen=True)
class Work:
    """An iteration: its completions, of `new` tokens each behind prompts of `prompt` tokens."""

    completions: int
    new: int
    prompt: int


class Training(NamedTuple):
    """Predicted and measured memory by stage. methods: seconds of iterations of HAPO and of DAPO, in pairs."""

    stages: list[Stage]
    measured: Measured
    methods: dict[str, list[float]]


def recipe_for(model: Path, work: Work, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a measurement. overrides: settings that come last."""
    return load_recipe(
        ROOT / "recipes" / "qwen1_5b_lora.yaml",
        [
            f"model.name={model}",
            f"data.max_prompt_tokens={work.prompt}",
            f"rollout.prompts_per_iteration={work.completions // 8}",
            f"rollout.batch_size={work.completions}",
            f"rollout.max_new_tokens={work.new}",
            f"training.micro_batch_tokens={4 * (work.prompt + work.new)}",
            "training.learning_rate=1e-12",
            "rollout.dynamic_sampling=false",
            "rollout.token_budget=null",
            *overrides,
        ],
    )


def measure_training(recipe: Recipe, pairs: int) -> Training:
    """Predict and measure the memory of `recipe`, then time `pairs` pairs of iterations."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = Predictor(recipe, device).stages(room=room_of(torch.device(device)))
    worst = prepare(recipe)
    measured = measure_loop(worst, print)
    return Training(stages, measured, compare_methods(worst.loop, pairs))


def compare_methods(loop: Loop, pairs: int) -> dict[str, list[float]]:
    """The seconds of iterations of HAPO and of DAPO, which take turns."""
    seconds: dict[str, list[float]] = {"hapo": [], "dapo": []}
    state = TrainState()
    for turn in range(pairs):
        for method in sorted(seconds, reverse=turn % 2 == 1):
            loop.recipe = loop.recipe.model_copy(update={"method": PRESETS[method]})
            started = time.perf_counter()
            state = loop.step(state).state
            seconds[method].append(time.perf_counter() - started)
    return seconds


def hapo_by_dapo(seconds: dict[str, list[float]]) -> float:
    """The median over pairs of HAPO's seconds to DAPO's."""
    return statistics.median(a / b for a, b in zip(seconds["hapo"], seconds["dapo"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5b", "7b"])
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--new", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the models are written; default: a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that come last")
    args = parser.parse_intermixed_args()
    keep_freed_memory()
    quiet_libraries()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    work = Work(args.completions, args.new, args.prompt)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        for shape in args.shapes:
            model = write_model(args.folder or Path(temporary), shape)
            found = measure_training(recipe_for(model, work, args.overrides), args.pairs)
            print(
                f"{shape}: {work.completions} completions of {work.new} tokens, prompts of {work.prompt}, on {device}"
            )
            print(memory_table(found.stages, found.measured))
            if args.pairs:
                medians = ", ".join(f"{name} {statistics.median(times):.2f} s" for name, times in found.methods.items())
                print(f"an iteration: {medians}; hapo / dapo {hapo_by_dapo(found.methods):.3f}")


if __name__ == "__main__":
    main()
