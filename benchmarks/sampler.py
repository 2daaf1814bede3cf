"""Tokens per second of a 4-bit base, packed and unpacked, beside the unquantised base; and distances to the trainer.

    python benchmarks/sampler.py MODEL --data FILE [--dtype bf16] [--rows 16] [--tokens 64] [--repeats 3] [--threads 2]

MODEL is a folder or a hub name. The three take turns, with the same prompts and random numbers; no token ends a
completion, so that all do the same work. The last lines have the mean and the largest distance of log-probabilities
from the trainer's, nats: for the sampler, and for one that samples outside autocast with the logits of the head's own
layer. Beside each stands the distance of the trainer itself scoring token by token, which comes from rounding alone.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.cli import keep_freed_memory, quiet_libraries  # noqa: E402
from hapo_lite.model.load import load_policy  # noqa: E402
from hapo_lite.model.policy import Policy  # noqa: E402
from hapo_lite.model.unpacked import Unpacking  # noqa: E402
from hapo_lite.recipe import load_recipe  # noqa: E402
from hapo_lite.records import Completion, EncodedPrompt, Request  # noqa: E402
from hapo_lite.rollout.canary import engine_logp, stepwise_logp, trainer_logp  # noqa: E402
from hapo_lite.rollout.draws import DrawKey, Stage  # noqa: E402
from hapo_lite.rollout.sampling import AdaptiveTemperature  # noqa: E402
from hapo_lite.rollout.transformers_engine import TransformersEngine  # noqa: E402
from hapo_lite.tasks.data import load_prompts  # noqa: E402

WAYS = {
    "unquantised": ("none", Unpacking.NEVER),
    "NF4": ("nf4", Unpacking.NEVER),
    "NF4, unpacked once": ("nf4", Unpacking.ALWAYS),
}


class PlainPolicy(Policy):
    """A policy that samples as an independent sampler does: outside autocast, with logits of the head's own layer."""

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        self.model.eval()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    quiet_libraries()
    settings = [f"model.name={arguments.model}", f"model.dtype={arguments.dtype}", f"data.source={arguments.data}"]
    recipe = load_recipe(ROOT / "recipes" / "qwen1_5b_lora.yaml", [*settings, "model.gradient_checkpointing=false"])
    bases = {
        quantization: load_policy(recipe.model.model_copy(update={"quantization": quantization}), 0, "cpu")
        for quantization in ("none", "nf4")
    }
    prompts = load_prompts(recipe.data).prompts[: arguments.rows]
    encoded = [EncodedPrompt(i, p, tuple(bases["none"].encode(p.chat()))) for i, p in enumerate(prompts)]
    requests = [Request(prompt, 0) for prompt in encoded]

    def sample(policy: Policy, limit: int) -> list[Completion]:
        engine = TransformersEngine(replace(policy, stop_ids=(-1,)), arguments.rows, limit)
        return engine.sample(requests, AdaptiveTemperature(None), DrawKey(0, Stage.BENCHMARK, 0))

    print(f"{arguments.model}, {arguments.dtype}, {arguments.rows} rows x {arguments.tokens} tokens; tokens/s, medians")
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.repeats):
        for way, (quantization, unpacked) in WAYS.items():
            policy = bases[quantization]
            if policy.dense is not None:
                policy.dense.wanted = unpacked
            started = time.perf_counter()
            written = sample(policy, arguments.tokens)
            rates[way].append(sum(c.length for c in written) / (time.perf_counter() - started))
    for way, values in rates.items():
        ratio = statistics.median(b / a for a, b in zip(values, rates["unquantised"], strict=True))
        print(f"{way:<20}{statistics.median(values):8.1f}   unquantised / this: {ratio:.3f}")
    policy = bases["none"]
    for name, sampler in (("this sampler", policy), ("a plain sampler", PlainPolicy(**vars(policy)))):
        print(f"{name:<20}{distances(policy, sample(sampler, arguments.tokens))}")


def distances(policy: Policy, completions: Sequence[Completion]) -> str:
    """How far the log-probabilities of completions, and those of single steps, are from the trainer's."""
    trainer = trainer_logp(policy, completions, 1.0)
    steps, _ = stepwise_logp(policy, completions, 1.0)
    own = (engine_logp(completions) - trainer).abs()
    rounding = (steps - trainer).abs()
    return (
        f"{own.mean():.2e} ({own.max():.2e} at most) from the trainer; rounding alone "
        f"{rounding.mean():.2e} ({rounding.max():.2e} at most)"
    )


if __name__ == "__main__":
    main()
