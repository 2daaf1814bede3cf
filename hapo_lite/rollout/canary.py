"""Before training: does the engine sample from the policy that is trained, adapter included?

An engine with a copy of the weights that is out of date, or that left the adapter out, trains to nothing and raises no
error. So the adapter is perturbed, and the engine's log-probabilities have to follow the trainer's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from hapo_lite.errors import UserError
from hapo_lite.policy import Policy, resolve_dtype
from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion, EncodedPrompt, Sequences
from hapo_lite.rollout.engine import CANARY, Engine, Request
from hapo_lite.rollout.sampling import AdaptiveTemperature

TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest mean distance between the engine's log-probabilities and the trainer's, nats, by compute dtype."""
MOVE = 10.0
"""The perturbation moves the trainer's log-probabilities by at least so many tolerances."""
PROMPTS, SAMPLES, TOKENS = 2, 2, 8
"""What is sampled, twice: so many completions of so many prompts, of at most so many tokens."""
STRENGTHS = [2.0**exponent for exponent in range(-14, 6)]
"""Standard deviations of the perturbation; the first that moves enough is taken."""


@dataclass(frozen=True)
class Canary:
    """Mean distances of log-probabilities over tokens, nats.

    at_rest, perturbed: engine to trainer, with the adapter as it is and perturbed. moved: trainer with the perturbed
    adapter to trainer without; followed: engine with the perturbed adapter to trainer without.
    """

    at_rest: float
    perturbed: float
    moved: float
    followed: float
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.at_rest:.1e} nats from the trainer's and {self.perturbed:.1e} with a perturbed adapter "
            f"({self.tolerance:g} allowed), which moved the trainer's by {self.moved:.1e} and the engine's by "
            f"{self.followed:.1e}"
        )


def check_engine(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[EncodedPrompt | None],
    recipe: Recipe,
    accelerator: Accelerator,
) -> Canary:
    """Sample a few tokens with the adapter as it is and perturbed, and compare with the trainer.

    The adapter is the same afterwards, to the last bit. Raises UserError, with the numbers, if they are too far apart.
    """
    settings = recipe.rollout
    tolerance = TOLERANCE[resolve_dtype(recipe.model.dtype, policy.device)]
    short = itertools.islice((prompt for prompt in prompts if prompt is not None), PROMPTS)
    requests = [Request(prompt, sample) for prompt in short for sample in range(SAMPLES)]

    def sampled() -> list[Completion]:
        processor = AdaptiveTemperature(None, settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
        return engine.sample(requests, processor, recipe.seed, CANARY, 0, limit=TOKENS)

    def scored(completions: Sequence[Completion]) -> Tensor:
        batch = Sequences.of(completions, policy.device)
        with torch.no_grad(), accelerator.autocast():
            logp, _ = policy.completion_logprobs(batch, settings.temperature)
        return logp[batch.mask].cpu()

    before = sampled()
    trainer_before = scored(before)
    for strength in STRENGTHS:
        with perturbed_adapter(policy, strength, recipe.seed):
            if distance(scored(before), trainer_before) >= MOVE * tolerance:
                after = sampled()
                trainer_after = scored(after)
                break
    else:
        raise UserError(
            f"no change of the adapter moves the policy's log-probabilities by {MOVE * tolerance:g} nats, so there is "
            "nothing to train: check model.lora.targets and model.lora.alpha"
        )
    unperturbed = scored(after)
    found = Canary(
        at_rest=distance(engine_logp(before), trainer_before),
        perturbed=distance(engine_logp(after), trainer_after),
        moved=distance(trainer_after, unperturbed),
        followed=distance(engine_logp(after), unperturbed),
        tolerance=tolerance,
    )
    # "not <=": a distance that is not a number is no agreement.
    if not max(found.at_rest, found.perturbed) <= tolerance:
        raise UserError(
            f"rollout.engine = {settings.engine} does not sample from the policy that is trained: its "
            f"log-probabilities are {found}; use rollout.engine=transformers, or other versions of the engine's "
            "packages"
        )
    return found


@contextlib.contextmanager
def perturbed_adapter(policy: Policy, strength: float, seed: int) -> Iterator[None]:
    """Seeded Gaussian noise of that standard deviation on every B matrix; afterwards they are what they were."""
    matrices = [p for name, p in policy.trainable().items() if "lora_B" in name or "lora_embedding_B" in name]
    kept = [p.detach().clone() for p in matrices]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for p in matrices:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=strength)
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(matrices, kept, strict=True):
                p.copy_(before)


def engine_logp(completions: Sequence[Completion]) -> Tensor:
    return torch.cat([c.base_logp for c in completions])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().mean())
