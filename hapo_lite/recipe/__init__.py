"""The recipe of a run: its settings, the rules between them, and the files that they come from."""

from hapo_lite.recipe.changes import first_incompatible_setting, flatten
from hapo_lite.recipe.curriculum import PassRateSettings, RestSettings, TrainingDataSettings
from hapo_lite.recipe.load import describe_fields, find_recipe, load_recipe, parse_recipe, read_recipe_file
from hapo_lite.recipe.lora import LoraSettings
from hapo_lite.recipe.schema import Recipe
from hapo_lite.recipe.sections import (
    FOLDER_NAME,
    OWN_REWARDS,
    BenchmarkSettings,
    CheckpointSettings,
    DataSettings,
    EvaluationSettings,
    LoggingSettings,
    ModelSettings,
    NamedReward,
    RewardSettings,
    RolloutSettings,
    SftSettings,
    SuiteSettings,
    TrainingSettings,
)
from hapo_lite.recipe.settings import NonNegative, Positive, nearest

__all__ = [
    "FOLDER_NAME",
    "OWN_REWARDS",
    "BenchmarkSettings",
    "CheckpointSettings",
    "DataSettings",
    "EvaluationSettings",
    "LoggingSettings",
    "LoraSettings",
    "ModelSettings",
    "NamedReward",
    "NonNegative",
    "PassRateSettings",
    "Positive",
    "Recipe",
    "RestSettings",
    "RewardSettings",
    "RolloutSettings",
    "SftSettings",
    "SuiteSettings",
    "TrainingDataSettings",
    "TrainingSettings",
    "describe_fields",
    "find_recipe",
    "first_incompatible_setting",
    "flatten",
    "load_recipe",
    "nearest",
    "parse_recipe",
    "read_recipe_file",
]
