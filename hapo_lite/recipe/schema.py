"""The whole recipe: its sections, the method that starts from a preset, and the rules between fields.

The resolved recipe is saved with the run, so that `runs/NAME/recipe.yaml` is all that is needed to repeat it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, field_validator, model_validator

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.recipe.curriculum import TrainingDataSettings
from hapo_lite.recipe.rules import ADVICE, RULES
from hapo_lite.recipe.sections import (
    BenchmarkSettings,
    CheckpointSettings,
    EvaluationSettings,
    FolderName,
    HomePath,
    LoggingSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    SftSettings,
    TrainingSettings,
)
from hapo_lite.recipe.settings import Section, nearest


class Recipe(Section):
    """All settings of one run."""

    name: FolderName = Field(description="The run's folder below output_dir")
    output_dir: HomePath = Field("runs", description="Where run folders are made")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Decides prompts, sampling, adapter initialisation and shuffling"
    )
    model: ModelSettings
    data: TrainingDataSettings
    reward: RewardSettings = Field(default_factory=RewardSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    method: Method = Field(default_factory=lambda: PRESETS["hapo"])
    training: TrainingSettings
    sft: SftSettings = Field(
        default_factory=SftSettings, description="What python -m hapo_lite.sft does; training ignores it"
    )
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    benchmark: BenchmarkSettings = Field(
        default_factory=BenchmarkSettings, description="What python -m hapo_lite.evaluate does; training ignores it"
    )
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)

    command: ClassVar[str] = "train"
    """The command whose run the recipe is of, which decides the settings that may change when the run is resumed."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name

    @classmethod
    def section_from_value(cls, name: str, value: Any) -> Any:
        """A method may be written as the name of the preset that it starts from."""
        return {"preset": value} if name == "method" and isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _held_out_prompts_are_worded_as_training_prompts(cls, recipe: Any) -> Any:
        """The model is measured on the prompts that it learns from: evaluation.data takes data.system_prompt."""
        if not isinstance(recipe, dict):
            return recipe
        data, evaluation = recipe.get("data"), recipe.get("evaluation")
        if not isinstance(data, dict) or not isinstance(evaluation, dict):
            return recipe
        own = evaluation.get("data")
        if isinstance(own, dict) and "source" in own and "system_prompt" in data:
            own = {"system_prompt": data["system_prompt"], **own}
            return {**recipe, "evaluation": {**evaluation, "data": own}}
        return recipe

    @field_validator("method", mode="before")
    @classmethod
    def _start_from_preset(cls, method: Any) -> Any:
        method = cls.section_from_value("method", method)
        if isinstance(method, Method):
            return method
        if not isinstance(method, dict):
            raise ValueError(f"must be one of {', '.join(PRESETS)}, or a mapping of pieces")
        preset = str(method.get("preset", "hapo"))
        if preset not in PRESETS:
            raise ValueError(f"preset {preset[:60]!r} is not one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
        return {**dataclasses.asdict(PRESETS[preset]), **method}

    @model_validator(mode="after")
    def _keeps_the_rules(self) -> Recipe:
        for rule in RULES:
            if broken := rule(self):
                raise ValueError(broken)
        return self

    @property
    def token_budget(self) -> int:
        """Most completion tokens sampled in one iteration under dynamic sampling."""
        rollout = self.rollout
        completions = rollout.prompts_per_iteration * rollout.completions_per_prompt
        return rollout.token_budget or 4 * completions * rollout.max_new_tokens

    def advice(self) -> list[str]:
        """Sentences about settings that are allowed but seldom meant."""
        return [sentence for rule in ADVICE if (sentence := rule(self))]

    def to_yaml(self) -> str:
        """The recipe as YAML, every field written out; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
