"""What the loop asks of a rollout engine, and the choice of one by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion, EncodedPrompt
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress

TRAINING, EVALUATION, BENCHMARK, CANARY = 0, 1, 2, 3
"""Stages, which separate the random numbers of training, its evaluations, `hapo_lite.evaluate` and the canary."""

ENGINES = {
    "transformers": ("hapo_lite.rollout.transformers_engine", "TransformersEngine", "'transformers>=5.10'"),
    "paged": ("hapo_lite.rollout.paged_engine", "PagedEngine", "'transformers>=5.17'"),
    "unsloth": ("hapo_lite.rollout.unsloth_engine", "UnslothEngine", "-e .[unsloth]"),
    "vllm": ("hapo_lite.rollout.vllm_engine", "VllmEngine", "-e .[vllm]"),
}
"""By `rollout.engine`: the module, its class, and what pip has to install for it. Imported when chosen."""


@dataclass(frozen=True)
class Request:
    """One completion to write: which prompt, and which of its samples."""

    prompt: EncodedPrompt
    sample: int


class Engine(Protocol):
    """Samples from the policy as it is now, adapter included.

    batch_size: completions written at once; it may be lowered between calls, and changes none of them. progress: told
    how far the sampling is; whoever uses the engine may put another one in its place.
    """

    batch_size: int
    progress: Progress

    def sample(
        self,
        requests: Sequence[Request],
        processor: AdaptiveTemperature,
        seed: int,
        stage: int,
        iteration: int,
        limit: int | None = None,
    ) -> list[Completion]:
        """One completion for each request, in order. Deterministic in (seed, stage, iteration, prompt, sample).

        limit: the longest completion, tokens; None: the engine's own.
        """
        ...

    @classmethod
    def make(cls, recipe: Recipe, policy: Policy, max_new_tokens: int) -> Engine:
        """The engine of a recipe. max_new_tokens: the longest completion. Raises ImportError, or UserError."""
        ...


def make_engine(recipe: Recipe, policy: Policy, max_new_tokens: int | None = None) -> Engine:
    """The engine that `rollout.engine` names. max_new_tokens: longest completion; None: the recipe's.

    Raises UserError, with what to install, if it cannot be imported.
    """
    settings = recipe.rollout
    module, name, needed = ENGINES[settings.engine]
    try:
        engine = getattr(importlib.import_module(module), name)
        return engine.make(recipe, policy, max_new_tokens or settings.max_new_tokens)
    except ImportError as error:
        raise UserError(
            f"rollout.engine = {settings.engine} cannot be imported ({error}): pip install {needed}"
        ) from error
