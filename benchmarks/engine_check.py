"""How often the check before training is right about the default engine and about engines with a fault.

    python benchmarks/engine_check.py MODEL --data FILE [--dtype bf16] [--quantization none] [--seeds 200]
        [--fault-seeds 20] [--out checks.jsonl] [section.key=value ...]

MODEL is a folder or a hub name. Each seed takes other prompts, other random numbers and another perturbation. Each
check adds a line to the file of `--out`; the same command, started again, makes only the checks that are not there yet.
The output has the mean distances over the seeds, the largest fraction of the allowed distance that the right engine
reached, and, for each fault, how many of the fault seeds caught it and the smallest multiple of the allowed distance.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.cli import quiet_libraries  # noqa: E402
from hapo_lite.model.load import load_policy  # noqa: E402
from hapo_lite.model.policy import Policy  # noqa: E402
from hapo_lite.recipe import Recipe, load_recipe  # noqa: E402
from hapo_lite.records import Completion, EncodedPrompt, Prompt  # noqa: E402
from hapo_lite.rollout import canary  # noqa: E402
from hapo_lite.rollout.engine import Engine, make_engine  # noqa: E402
from hapo_lite.runs.lines import MetricsFile  # noqa: E402
from hapo_lite.tasks.data import load_prompts  # noqa: E402
from hapo_lite.train.accelerator import make_accelerator  # noqa: E402

PROMPTS = 16
"""Prompts that each seed offers to the check."""
RIGHT = "right"
"""What the engine without a fault is called in the file of checks."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of one engine. engine: its fault, or RIGHT. seconds: how long the check took."""

    engine: str
    seed: int
    found: canary.Canary
    seconds: float


class Checks:
    """The checks of one setup, kept in a file of lines. path: the file; None keeps them in memory alone.

    setup: the arguments that decide what a check finds. Lines of another setup are passed over.
    """

    def __init__(self, path: Path | None, setup: str) -> None:
        self.file = MetricsFile(path) if path else None
        self.setup = setup
        self.made: dict[tuple[str, int], Check] = {}
        for line in self.file.read() if self.file else []:
            if line["setup"] == setup:
                distances = {key: canary.Distance(**line[key]) for key in ("at_rest", "perturbed")}
                found = canary.Canary(**distances, moved=line["moved"], followed=line["followed"])
                self.add(Check(line["engine"], line["seed"], found, line["seconds"]))

    def add(self, check: Check) -> None:
        self.made[check.engine, check.seed] = check

    def get(self, name: str, seed: int, make: Callable[[], canary.Canary]) -> Check:
        """The check of that engine and seed, made by `make` if it is not there yet."""
        if (name, seed) not in self.made:
            started = time.perf_counter()
            check = Check(name, seed, make(), time.perf_counter() - started)
            self.add(check)
            if self.file:
                found = dataclasses.asdict(check.found)
                self.file.append({"setup": self.setup, "engine": name, "seed": seed, **found, "seconds": check.seconds})
        return self.made[name, seed]


class FaultyEngine:
    """A right engine that samples while a fault changes its policy. fault: the context that changes it."""

    def __init__(self, engine: Engine, fault: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self.engine = engine
        self.fault = fault
        self.batch_size = engine.batch_size
        self.progress = engine.progress

    def sample(self, *arguments: Any, **options: Any) -> list[Completion]:
        with self.fault():
            return self.engine.sample(*arguments, **options)


def lora_layers(policy: Policy) -> list[LoraLayer]:
    return [module for module in policy.model.modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def scaled(policy: Policy, factor: float) -> Iterator[None]:
    """A context in which the adapter has `factor` times its scale."""
    layers = lora_layers(policy)
    try:
        for layer in layers:
            layer.scaling["default"] *= factor
        yield
    finally:
        for layer in layers:
            layer.scaling["default"] /= factor


@contextlib.contextmanager
def without_block(policy: Policy, number: int) -> Iterator[None]:
    """A context in which the adapter lacks its part in the block of that number, modulo the count of blocks."""
    base: Any = policy.model.get_base_model()
    blocks = base.get_decoder().layers
    layers = [m for m in blocks[number % len(blocks)].modules() if isinstance(m, LoraLayer)]
    kept = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling["default"] = 0.0
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling.update(scaling)


class OneStepOld:
    """A context with the adapter of the previous call, or at the first call with the current adapter."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.kept: list[torch.Tensor] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        parameters = list(self.policy.trainable().values())
        now = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, old in zip(parameters, self.kept or now, strict=True):
                p.copy_(old)
        try:
            yield
        finally:
            self.kept = now
            with torch.no_grad():
                for p, new in zip(parameters, now, strict=True):
                    p.copy_(new)


class OtherBase:
    """An engine on another base, which gets a copy of the adapter before it samples."""

    def __init__(self, recipe: Recipe, policy: Policy, other: Policy) -> None:
        self.policy = policy
        self.other = other
        self.engine = make_engine(recipe, other)
        self.batch_size = self.engine.batch_size
        self.progress = self.engine.progress

    def sample(self, *arguments: Any, **options: Any) -> list[Completion]:
        with torch.no_grad():
            for name, p in self.other.trainable().items():
                p.copy_(self.policy.trainable()[name])
        return self.engine.sample(*arguments, **options)


def faulty_engines(recipe: Recipe, policy: Policy, other: Policy | None, seed: int) -> dict[str, Engine]:
    """Engines by their fault. other: the same model with its base quantised in another way."""
    engine = make_engine(recipe, policy)
    found: dict[str, Engine] = {
        "adapter one step old": FaultyEngine(engine, OneStepOld(policy)),
        "adapter left out": FaultyEngine(engine, policy.base_alone),
        "one block's adapter missing": FaultyEngine(engine, lambda: without_block(policy, seed)),
        "scale doubled": FaultyEngine(engine, lambda: scaled(policy, 2.0)),
        "scale halved": FaultyEngine(engine, lambda: scaled(policy, 0.5)),
    }
    if other is not None:
        found["another quantisation of the base"] = OtherBase(recipe, policy, other)
    return found


def prompts_for(seed: int, prompts: Sequence[Prompt], policy: Policy) -> list[EncodedPrompt]:
    chosen = [prompts[(PROMPTS * seed + i) % len(prompts)] for i in range(PROMPTS)]
    return [EncodedPrompt(i, prompt, tuple(policy.encode(prompt.chat()))) for i, prompt in enumerate(chosen)]


def report_right(checks: Sequence[Check]) -> None:
    """Print the distances of the right engine."""
    found = [check.found for check in checks]
    rows = {
        "engine to trainer, at rest": [f.at_rest.engine for f in found],
        "rounding alone, at rest": [f.at_rest.floor for f in found],
        "engine to trainer, perturbed": [f.perturbed.engine for f in found],
        "rounding alone, perturbed": [f.perturbed.floor for f in found],
        "perturbed by": [f.moved for f in found],
        "followed": [f.followed for f in found],
    }
    for name, values in rows.items():
        print(f"{name:<32}mean {statistics.fmean(values):.3g}, {min(values):.3g} to {max(values):.3g}")
    seconds = statistics.fmean(check.seconds for check in checks)
    print(f"false alarms {sum(not f.right for f in found)} of {len(found)}; {seconds:.1f} s a check")
    print(f"most that a right engine took of what is allowed: {max(max(f.shares) for f in found):.2f}", flush=True)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--fault-seeds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the checks, one line each")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    settings = [f"model.name={arguments.model}", f"model.dtype={arguments.dtype}", f"data.source={arguments.data}"]
    settings += ["model.gradient_checkpointing=false", *arguments.overrides]
    recipe = load_recipe(ROOT / "recipes" / "qwen1_5b_lora.yaml", settings)
    model = recipe.model.model_copy(update={"quantization": arguments.quantization})
    accelerator = make_accelerator(recipe)
    policy = load_policy(model, 0, accelerator.device)
    prompts = load_prompts(recipe.data).prompts
    print(f"{arguments.model}, {arguments.quantization}, {arguments.dtype}, torch {torch.__version__}", flush=True)

    setup = f"{arguments.model} {arguments.quantization} {arguments.dtype} {' '.join(arguments.overrides)}".strip()
    checks = Checks(arguments.out, setup)

    def check(name: str, engine: Engine, seed: int) -> Check:
        asked = prompts_for(seed, prompts, policy)
        return checks.get(name, seed, lambda: canary.compare(engine, policy, asked, recipe.rollout, seed))

    right = []
    for seed in range(arguments.seeds):
        right.append(check(RIGHT, make_engine(recipe, policy), seed))
        if not right[-1].found.right:
            print(f"seed {seed}: a right engine is accused: {right[-1].found}", flush=True)
    if right:
        report_right(right)
    if not arguments.fault_seeds:
        return
    swapped = {"none": "nf4", "nf4": "none"}[arguments.quantization]
    other = load_policy(recipe.model.model_copy(update={"quantization": swapped}), 0, accelerator.device)
    shares: dict[str, list[float]] = {}
    for seed in range(arguments.fault_seeds):
        for name, engine in faulty_engines(recipe, policy, other, seed).items():
            shares.setdefault(name, []).append(max(check(name, engine, seed).found.shares))
    for name, values in shares.items():
        caught = sum(value > 1.0 for value in values)
        print(f"{name:<34}caught {caught} of {len(values)}; at least {min(values):.1f} times what is allowed")


if __name__ == "__main__":
    main()
