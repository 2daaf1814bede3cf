"""Processor seconds of an update's gradients with all tokens and with a share of them (method.token_share).

    python benchmarks/token_share.py [MODEL] [--completions 8] [--tokens 256] [--turns 5] [section.key=value ...]

Completions are random tokens of one length after a prompt of 32, in one micro-batch, and DAPO is the method. The shares
take turns on the same model and completions. The seconds are those of the processor on one thread, which other programs
on the machine disturb less than the wall clock; the numbers are medians, the ratios are those to all tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.cli import keep_freed_memory, quiet_libraries  # noqa: E402
from hapo_lite.model.load import load_policy  # noqa: E402
from hapo_lite.model.policy import Policy  # noqa: E402
from hapo_lite.preflight.measure import worst_loop  # noqa: E402
from hapo_lite.recipe import load_recipe  # noqa: E402
from hapo_lite.records import Completion, EncodedPrompt, Graded, Prompt, Score  # noqa: E402
from hapo_lite.runs.progress import Progress  # noqa: E402
from hapo_lite.train.accelerator import make_accelerator  # noqa: E402
from hapo_lite.train.batching import make_plan  # noqa: E402
from hapo_lite.train.loop import Loop  # noqa: E402

SHARES = (1.0, 0.5, 0.25)
PROMPT = 32


def random_completions(policy: Policy, count: int, tokens: int) -> Graded:
    """Completions of random tokens, half of them correct."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(policy.tokenizer)
    nothing = torch.zeros(tokens)
    completions = []
    for index in range(count):
        ids = torch.randint(vocabulary, (PROMPT + tokens,), generator=generator)
        prompt = EncodedPrompt(index, Prompt(str(index), (), ""), tuple(ids[:PROMPT].tolist()))
        completions.append(Completion(prompt, 0, ids[PROMPT:], "", False, nothing, nothing, nothing, nothing + 1.0))
    return Graded(completions, [Score(float(i % 2), bool(i % 2), "", None) for i in range(count)])


def measure(loop: Loop, graded: Graded, turns: int) -> dict[float, float]:
    """Median seconds of the gradients by share."""
    everything = list(range(len(graded)))
    plan = make_plan([everything], graded.sequence_lengths, everything, 10**9)
    advantage = torch.tensor([1.0, -1.0] * (len(graded) // 2))
    plain = loop.recipe.method
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    for turn in range(turns + 1):
        for share in SHARES if turn % 2 else SHARES[::-1]:
            loop.recipe = loop.recipe.model_copy(update={"method": replace(plain, token_share=share)})
            experience = loop.scoring.score(graded, advantage, plan, loop.selection_key(turn)).experience
            started = time.process_time()
            loop.update.gradients(experience, plan.updates[0], float(len(graded)))
            if turn:  # The first turn warms up.
                seconds[share].append(time.process_time() - started)
    return {share: statistics.median(found) for share, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--completions", type=int, default=8, help="an even number")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    quiet_libraries()
    overrides = [f"model.name={args.model}", "method=dapo", f"rollout.max_new_tokens={args.tokens}"]
    recipe = load_recipe(ROOT / "recipes" / "tiny_cpu.yaml", [*overrides, *args.overrides])
    accelerator = make_accelerator(recipe)
    policy = load_policy(recipe.model, recipe.seed, accelerator.device)
    loop = worst_loop(recipe, policy, accelerator, Progress())
    found = measure(loop, random_completions(policy, args.completions, args.tokens), args.turns)
    print(f"torch {torch.__version__}, {args.completions} x {args.tokens} tokens of {args.model}")
    for share, seconds in found.items():
        print(f"token_share {share}: {seconds:.3f} s, {seconds / found[1.0]:.2f} of all tokens")


if __name__ == "__main__":
    main()
