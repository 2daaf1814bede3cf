"""Seconds per iteration on the bundled task: HAPO beside DAPO and, if it is installed, TRL's GRPOTrainer.

    python benchmarks/iteration.py [--iterations 20] [--trl] [--default-malloc] [section.key=value ...]

An iteration has 128 completions and 2 updates, on a 4-bit base with LoRA. The learning rate is so small that every
iteration does the work of the first. HAPO and DAPO take turns on the same model, so that a disturbance of the machine
affects both. The numbers are medians; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.cli import keep_freed_memory, quiet_libraries  # noqa: E402
from hapo_lite.model.load import load_policy  # noqa: E402
from hapo_lite.recipe import LoraSettings, Recipe, load_recipe  # noqa: E402
from hapo_lite.rollout.engine import make_engine  # noqa: E402
from hapo_lite.runs.checkpoint import TrainState  # noqa: E402
from hapo_lite.tasks.rewards import Scorer  # noqa: E402
from hapo_lite.tasks.stream import PromptStream  # noqa: E402
from hapo_lite.train.accelerator import make_accelerator  # noqa: E402
from hapo_lite.train.collect import Collector  # noqa: E402
from hapo_lite.train.loop import Loop  # noqa: E402
from hapo_lite.train.prompts import encode_prompts, load_data  # noqa: E402

STAGES = ("rollout", "grade", "score", "update", "iteration")
RATE = 1e-12


def recipe_for(method: str, overrides: list[str]) -> Recipe:
    fixed = [f"method={method}", "training.updates_per_iteration=2", f"training.learning_rate={RATE}"]
    return load_recipe(ROOT / "recipes" / "tiny_cpu.yaml", [*fixed, "logging.traces_per_iteration=0", *overrides])


def build_loop(recipe: Recipe, scorer: Scorer, accelerator: Accelerator) -> Loop:
    limit = recipe.rollout.max_new_tokens
    policy = load_policy(recipe.model, recipe.seed, accelerator.device)
    prompts = load_data(recipe.data, recipe.evaluation, recipe.seed, lambda text: None).training
    encoded = encode_prompts(prompts[:1024], policy, recipe.data, limit, say=lambda text: None)
    engine = make_engine(recipe, policy)
    return Loop(recipe, policy, Collector(engine, scorer, accelerator), PromptStream(encoded, recipe.seed))


def measure_ours(iterations: int, overrides: list[str]) -> None:
    recipes = {method: recipe_for(method, overrides) for method in ("hapo", "dapo")}
    accelerator = make_accelerator(recipes["hapo"])
    with Scorer(recipes["hapo"].reward, recipes["hapo"].rollout.max_new_tokens) as scorer:
        loop = build_loop(recipes["hapo"], scorer, accelerator)
        states = dict.fromkeys(recipes, TrainState())
        rows: dict[str, list[dict[str, float]]] = {method: [] for method in recipes}
        for turn in range(iterations + 2):
            for method in sorted(recipes, reverse=turn % 2 == 1):
                loop.recipe = recipes[method]
                started = time.perf_counter()
                done = loop.step(states[method])
                states[method] = done.state
                rows[method].append(done.metrics | {"seconds/iteration": time.perf_counter() - started})
    for method, found in rows.items():
        medians = (statistics.median(m[f"seconds/{stage}"] for m in found[2:]) for stage in STAGES)
        length = statistics.mean(m["length/mean"] for m in found[2:])
        split = ", ".join(f"{stage} {value:.3f}" for stage, value in zip(STAGES, medians, strict=True))
        print(f"{method}: {split} s; {length:.1f} tokens per completion")
    pairs = zip(rows["hapo"][2:], rows["dapo"][2:], strict=True)
    ratios = [a["seconds/iteration"] / b["seconds/iteration"] for a, b in pairs]
    print(f"hapo / dapo: {statistics.median(ratios):.3f}")


def measure_trl(iterations: int, lora: LoraSettings) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from hapo_lite.model.load import keep_weights_unpacked
    from hapo_lite.model.origins import TINY_MODEL
    from hapo_lite.tasks.verify import grade
    from hapo_lite.tiny.task import problems

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        TINY_MODEL, dtype=torch.float32, use_safetensors=True, quantization_config=quantization
    )
    keep_weights_unpacked(model)
    rows = [
        {"prompt": [{"role": "user", "content": p.prompt}], "answer": str(p.answer)} for p in problems("train")[:2048]
    ]
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments.append(time.perf_counter())

    def reward(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
        return [float(grade(c[0]["content"], gold).correct) for c, gold in zip(completions, answer, strict=True)]

    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL, padding_side="left"),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=64,
            steps_per_generation=2,
            num_generations=8,
            max_completion_length=32,
            max_steps=2 * (iterations + 2),
            learning_rate=RATE,
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int and scales by any number
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    ends = moments[1::2]
    seconds = [b - a for a, b in itertools.pairwise(ends[1:])]
    print(f"TRL GRPOTrainer: iteration {statistics.median(seconds):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--trl", action="store_true", help="measure TRL's trainer too (pip install trl==1.16.0)")
    parser.add_argument("--default-malloc", action="store_true", help="let glibc hand freed pages back")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    if not args.default_malloc:
        keep_freed_memory()
    quiet_libraries()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    measure_ours(args.iterations, args.overrides)
    if args.trl:
        measure_trl(args.iterations, recipe_for("hapo", args.overrides).model.lora)


if __name__ == "__main__":
    main()
