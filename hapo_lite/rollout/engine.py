"""What the training loop asks of a rollout engine, and the choice of one by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import ModelSettings, Recipe, RolloutSettings
from hapo_lite.records import Completion, Request
from hapo_lite.rollout.draws import DrawKey
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.progress import Progress

ENGINES = {
    "transformers": ("hapo_lite.rollout.transformers_engine", "TransformersEngine", "'transformers>=5.10'"),
    "paged": ("hapo_lite.rollout.paged_engine", "PagedEngine", "'transformers>=5.17'"),
    "unsloth": ("hapo_lite.rollout.unsloth_engine", "UnslothEngine", "-e .[unsloth]"),
    "vllm": ("hapo_lite.rollout.vllm_engine", "VllmEngine", "-e .[vllm]"),
}
"""By `rollout.engine`: the module, its class, and what pip has to install for it. Imported when chosen."""


@dataclass(frozen=True)
class EngineSettings:
    """What engines are made from, beside the policy.

    max_prompt_tokens, max_new_tokens: the longest prompt and the longest completion, tokens. seed: of an engine's own
    random numbers, which no completion depends on.
    """

    rollout: RolloutSettings
    model: ModelSettings
    max_prompt_tokens: int
    max_new_tokens: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe, max_new_tokens: int | None = None) -> EngineSettings:
        """The recipe's. max_new_tokens: None takes rollout.max_new_tokens."""
        return cls(
            rollout=recipe.rollout,
            model=recipe.model,
            max_prompt_tokens=recipe.data.max_prompt_tokens,
            max_new_tokens=max_new_tokens or recipe.rollout.max_new_tokens,
            seed=recipe.seed,
        )


class Engine(Protocol):
    """Samples from the policy with its current adapter.

    batch_size: completions written at once. It may be lowered between calls; completions do not depend on it.
    progress: is told how far the sampling is. The engine's user may replace it.
    """

    batch_size: int
    progress: Progress

    def sample(
        self,
        requests: Sequence[Request],
        processor: AdaptiveTemperature,
        key: DrawKey | int,
        *rest: int | None,
        limit: int | None = None,
    ) -> list[Completion]:
        """One completion for each request, in order.

        A completion depends on the policy, the processor, the key, and its request's prompt and sample alone.
        key: a `DrawKey`, or seed, stage and iteration by position. limit: the longest completion in tokens, by name or
        by position after the key; None: the engine's own.
        """
        ...


class EngineClass(Protocol):
    """A class of engines."""

    def make(self, settings: EngineSettings, policy: Policy) -> Engine:
        """Start an engine. Raises ImportError or UserError where it cannot start."""
        ...


def make_engine(recipe: Recipe, policy: Policy, max_new_tokens: int | None = None) -> Engine:
    """The engine that `rollout.engine` names. max_new_tokens: the longest completion; None: the recipe's.

    Raises UserError where the engine cannot start; where it cannot be imported the message says what to install.
    """
    name = recipe.rollout.engine
    module, class_name, needed = ENGINES[name]
    try:
        engine: EngineClass = getattr(importlib.import_module(module), class_name)
        return engine.make(EngineSettings.of(recipe, max_new_tokens), policy)
    except ImportError as error:
        raise UserError(f"rollout.engine = {name} cannot be imported ({error}): pip install {needed}") from error
