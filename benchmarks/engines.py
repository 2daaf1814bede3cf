"""Sampled tokens per second of each rollout engine, on the bundled model and the same requests.

    python benchmarks/engines.py [--repeats 3] [--engines generate,transformers,paged] [section.key=value ...]

`generate` is the loop of transformers, where every completion reads its own prompt and stays in the batch until the
last has ended. `plain` is `generate` on the layers of peft and bitsandbytes as these libraries make them: the adapter
as peft computes it, and a 4-bit base that is unpacked in every step. The engines take turns, so that a disturbance of
the machine affects all. The numbers are medians; a ratio is to the first engine in the same turn. The same random
numbers give the same completions, and so the same work. `recorded` is `transformers` with its steps recorded as CUDA
graphs; without a card nothing is recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.cli import quiet_libraries  # noqa: E402
from hapo_lite.model.load import load_policy  # noqa: E402
from hapo_lite.model.policy import Policy  # noqa: E402
from hapo_lite.recipe import Recipe, load_recipe  # noqa: E402
from hapo_lite.records import Completion, Request  # noqa: E402
from hapo_lite.rollout.draws import DrawKey, Stage  # noqa: E402
from hapo_lite.rollout.engine import Engine, make_engine  # noqa: E402
from hapo_lite.rollout.generate_engine import GenerateEngine  # noqa: E402
from hapo_lite.rollout.sampling import AdaptiveTemperature  # noqa: E402
from hapo_lite.rollout.transformers_engine import TransformersEngine  # noqa: E402
from hapo_lite.train.prompts import encode_prompts, load_data  # noqa: E402


def plain(policy: Policy) -> Policy:
    """The policy with the layers of peft and bitsandbytes as these libraries make them."""
    for layer in policy.model.modules():
        vars(layer).pop("forward", None)
    return dataclasses.replace(policy, dense=None)


def engine(name: str, recipe: Recipe, policy: Policy) -> Engine:
    """The engine of that name, `generate`, `recorded`, or `plain` with a policy of its own."""
    size, longest = recipe.rollout.batch_size, recipe.rollout.max_new_tokens
    if name == "plain":
        return GenerateEngine(plain(load_policy(recipe.model, recipe.seed, policy.device.type)), size, longest)
    if name == "generate":
        return GenerateEngine(policy, size, longest)
    if name == "recorded":
        return TransformersEngine(policy, size, longest, cuda_graphs="on")
    return make_engine(
        recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"engine": name})}), policy
    )


class Speeds(NamedTuple):
    """By engine: tokens/s of each turn after the first, and the completions of the last turn."""

    tokens_per_s: dict[str, list[float]]
    written: dict[str, list[Completion]]

    def ratio(self, name: str, to: str) -> float:
        """The median over turns of an engine's speed to that of the engine `to`."""
        pairs = zip(self.tokens_per_s[name], self.tokens_per_s[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def same(self, name: str, to: str) -> int:
        """How many completions of the last turn have the same tokens as those of the engine `to`."""
        return sum(torch.equal(a.ids, b.ids) for a, b in zip(self.written[name], self.written[to], strict=True))


def requests_of(recipe: Recipe, policy: Policy) -> list[Request]:
    """The requests of the recipe's first iteration."""
    settings = recipe.rollout
    prompts = load_data(recipe.data, recipe.evaluation, recipe.seed, lambda text: None).training
    encoded = encode_prompts(
        prompts[: settings.prompts_per_iteration], policy, recipe.data, settings.max_new_tokens, say=lambda text: None
    )
    return [Request(p, sample) for p in encoded for sample in range(settings.completions_per_prompt)]


def measure(engines: dict[str, Engine], requests: list[Request], seed: int, repeats: int) -> Speeds:
    """Let the engines write the same completions in turn, once to warm up and then `repeats` times."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    written = {}
    for turn in range(repeats + 1):
        for name, each in engines.items():
            started = time.perf_counter()
            written[name] = each.sample(requests, AdaptiveTemperature(None), DrawKey(seed, Stage.TRAINING, turn))
            if turn:
                seconds = time.perf_counter() - started
                speeds[name].append(sum(c.length for c in written[name]) / seconds)
    return Speeds(speeds, written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", type=lambda names: names.split(","), default=["generate", "transformers", "paged"])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    quiet_libraries()
    recipe = load_recipe(ROOT / "recipes" / "tiny_cpu.yaml", args.overrides)
    unsloth = "unsloth" if "unsloth" in args.engines else "transformers"
    policy = load_policy(recipe.model, recipe.seed, "cuda" if torch.cuda.is_available() else "cpu", engine=unsloth)
    requests = requests_of(recipe, policy)
    engines = {name: engine(name, recipe, policy) for name in args.engines}
    found = measure(engines, requests, recipe.seed, args.repeats)
    first = args.engines[0]
    mean_length = statistics.mean(c.length for c in found.written[first])
    print(
        f"torch {torch.__version__}, {policy.device}, {torch.get_num_threads()} threads; "
        f"{len(requests)} completions of {mean_length:.0f} tokens, {recipe.rollout.batch_size} at once"
    )
    for name in engines:
        print(
            f"{name}: {statistics.median(found.tokens_per_s[name]):,.0f} tokens/s, "
            f"{found.ratio(name, first):.2f} x {first}; "
            f"{found.same(name, first)} of {len(requests)} completions the same"
        )


if __name__ == "__main__":
    main()
