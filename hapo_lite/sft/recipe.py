"""The recipe of a warm start: the run's own folder, and how many updates it makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

from hapo_lite.recipe import Recipe, TrainingSettings

SUFFIX = "-sft"


class WarmRecipe(Recipe):
    """A recipe as a warm start reads it. It has the same fields."""

    command: ClassVar[str] = "sft"

    @classmethod
    def of(cls, recipe: Recipe) -> WarmRecipe:
        """The warm start of `recipe`."""
        return cls.model_validate(recipe.model_dump())

    @property
    def run_dir(self) -> Path:
        """The warm start's folder, beside that of the recipe's run."""
        return Path(self.output_dir) / f"{self.name}{SUFFIX}"

    @property
    def max_solution_tokens(self) -> int:
        """Longest worked solution, tokens."""
        return self.sft.max_solution_tokens or self.rollout.max_new_tokens

    def updates(self, solutions: int) -> int:
        """Number of optimiser steps. solutions: number of those to train on."""
        return self.sft.updates or math.ceil(self.sft.epochs * solutions / self.sft.batch_size)

    def training_of(self, solutions: int) -> TrainingSettings:
        """The section `training` of the warm start, where an iteration is one update."""
        return self.training.model_copy(
            update={
                "iterations": self.updates(solutions),
                "updates_per_iteration": 1,
                "max_tokens": None,
                "learning_rate": self.sft.learning_rate,
                "schedule": self.sft.schedule,
                "warmup_updates": self.sft.warmup_updates,
            }
        )
