"""The comparison file with its arms, seeds and tokens, and the recipe of every run that follows from them.

recipe: tiny_cpu.yaml             # the recipe of one run: a file beside this one, or the settings themselves
settings: {evaluation.every: 5}   # changes for all arms
arms:
  dapo: {method: dapo}            # changes for one arm, written as on the command line of a run
  hapo: {method: hapo}
seeds: [0, 1, 2]
tokens: 100000
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, field_validator, model_validator

from hapo_lite.errors import UserError
from hapo_lite.recipe import FOLDER_NAME, NonNegative, Positive, Recipe, find_recipe, parse_recipe, read_recipe_file
from hapo_lite.recipe.sections import FolderName, HomePath
from hapo_lite.recipe.settings import Section, nearest, parse_override, put, read_mapping, validate

CAP = 4
"""Most iterations of a run as a multiple of the recipe's, where max_iterations is null."""
OURS = {
    "name": "a run is named after its arm and seed",
    "output_dir": "it is a field of the comparison",
    "seed": "use seeds",
    "training.max_tokens": "use tokens",
}
"""Settings of a run that the comparison decides, and what to do instead."""
ALIKE = {
    "data": "pairs of runs see the same prompts in the same order",
    "evaluation": "all arms are measured alike",
    "training.iterations": "an arm ends by its tokens; max_iterations bounds all of them",
}
"""Settings that must be the same for all arms, and why."""


class Comparison(Section):
    """Methods x seeds at equal tokens."""

    name: FolderName = Field(description="The comparison's folder below output_dir")
    output_dir: HomePath = Field("runs", description="Where that folder is made")
    about: str = Field("", description="What is asked, in a sentence or two; heads the report")
    recipe: dict[str, Any] = Field(description="Recipe of a run: a file, relative to this one, or the settings")
    settings: dict[str, Any] = Field(default_factory=dict, description="Changes of that recipe for all arms")
    arms: dict[str, dict[str, Any]] = Field(description="Name of each arm, and its changes of the recipe")
    reference: str | None = Field(None, description="The arm that the others are compared with; null: the first")
    seeds: tuple[NonNegative, ...] = Field((0, 1, 2, 3, 4), description="Each arm runs once with each of them")
    tokens: Positive = Field(description="Completion tokens that every run samples in training")
    max_iterations: Positive | None = Field(
        None, description=f"Most iterations of a run, if its tokens take longer; null: {CAP} x the recipe's"
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Accuracy to be reached; null: half-way from the accuracy before to the reference's last"
    )
    workers: Positive = Field(1, description="Runs at a time, each on one thread; on a GPU always 1")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def base(self) -> str:
        """The arm that the others are compared with."""
        return self.reference or next(iter(self.arms))

    @field_validator("arms", mode="before")
    @classmethod
    def _an_arm_may_change_nothing(cls, arms: Any) -> Any:
        if not isinstance(arms, dict):
            return arms
        return {str(name): {} if changes is None else changes for name, changes in arms.items()}

    @model_validator(mode="after")
    def _rules(self) -> Comparison:
        for name in self.arms:
            # A dot in an override, such as arms.hapo.method, leads into the arm.
            if not re.fullmatch(FOLDER_NAME, name) or "." in name:
                raise ValueError(f"arms: {name!r} must be of letters, digits and _ + -: folders are named after it")
        if len(self.arms) < 2:
            raise ValueError("arms must hold at least two: there is nothing to compare")
        if self.base not in self.arms:
            raise ValueError(f"reference: {self.reference!r} is not one of the arms{nearest(self.base, self.arms)}")
        if not self.seeds:
            raise ValueError("seeds must hold at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ: a repeated seed repeats its runs")
        return self

    def to_yaml(self) -> str:
        """The comparison as the text of a comparison file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed."""

    arm: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.name


def load_comparison(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Comparison:
    """Read a comparison file, with the recipe it names. Raises UserError with one sentence.

    path: a file, or the name of a shipped comparison, such as `compare_tiny`.
    overrides: `key=value` of the comparison (`seeds=[0,1]`, `arms.hapo.method.tau=0.1`) or, for all arms, of the recipe
    (`training.learning_rate=1e-4`).
    """
    path = find_recipe(path)
    fields = read_mapping(path, "comparison", "`recipe:` and `arms:`")
    if "model" in fields and "arms" not in fields:
        raise UserError(f"{path} is the recipe of one run: use python -m hapo_lite.train {path}, or give it arms")
    for override in overrides:
        _override(fields, override)
    keys = {override.partition("=")[0].partition(".")[0] for override in overrides}
    if keys & {"arms", "reference"} and "about" not in keys:
        fields.pop("about", None)  # It describes the file's own arms.
    fields.setdefault("name", path.stem)
    if isinstance(fields.get("recipe"), str):
        fields["recipe"] = read_recipe_file(path.parent / fields["recipe"])
    return validate(Comparison, fields, str(path), overrides)


def planned_runs(comparison: Comparison) -> list[PlannedRun]:
    """Every run, seed by seed, so that the arms advance together. Raises UserError that names an arm with a mistake."""
    return [
        PlannedRun(arm, seed, _recipe_of(comparison, arm, seed)) for seed in comparison.seeds for arm in comparison.arms
    ]


def flat_changes(changes: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and value of each change: {"method": {"tau": 0.1}} -> ("method.tau", 0.1)."""
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            yield from flat_changes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(fields: dict[str, Any], override: str) -> None:
    key, value = parse_override(override)
    section = key.partition(".")[0]
    if section in Recipe.model_fields and section not in Comparison.model_fields:
        changes = fields.get("settings") or {}
        if not isinstance(changes, dict):
            raise UserError("settings is a single value, not a section")
        # The override goes to the end, behind what the file says about the same field.
        changes.pop(key, None)
        fields["settings"] = {**changes, key: value}
    else:
        put(Recipe, fields, key, value, override)


def _recipe_of(comparison: Comparison, arm: str, seed: int) -> Recipe:
    settings = copy.deepcopy(comparison.recipe)
    for change in _changes(comparison, arm):
        _check_change(change.where, change.key)
        put(Recipe, settings, change.key, copy.deepcopy(change.value), f"{change.where}: {change.key}")
    settings |= {"name": f"{arm}-seed{seed}", "output_dir": str(comparison.folder), "seed": seed}
    where = f"{comparison.name}, arm {arm}"
    alone = parse_recipe(settings, where)
    if not alone.evaluation.prompts:
        raise UserError(f"{where}: evaluation.prompts is 0, which leaves nothing to compare by: set it to 1 or more")
    put(Recipe, settings, "training.max_tokens", comparison.tokens, where)
    put(Recipe, settings, "training.iterations", comparison.max_iterations or CAP * alone.training.iterations, where)
    put(Recipe, settings, "checkpoint.resume", "auto", where)
    put(Recipe, settings, "logging.progress", False, where)
    return parse_recipe(settings, where)


class Change(NamedTuple):
    """A changed setting of a run. where: the part of the comparison that changes it, `settings` or `arms.NAME`."""

    where: str
    key: str
    value: Any


def _changes(comparison: Comparison, arm: str) -> list[Change]:
    """The changes of the recipe for one arm, in their order: those of all arms, and then the arm's own.

    An arm that names a whole section, such as `method: dapo`, comes before the settings of all arms that are within
    that section, such as `method.dual_clip`, which it would otherwise undo.
    """
    shared = [Change("settings", *change) for change in flat_changes(comparison.settings)]
    own = [Change(f"arms.{arm}", *change) for change in flat_changes(comparison.arms[arm])]
    first = [c for c in own if any(other.key.startswith(f"{c.key}.") for other in shared)]
    return first + shared + [c for c in own if c not in first]


def _check_change(where: str, key: str) -> None:
    """Raise UserError for a change that the comparison, or an arm of it, may not make."""
    reason = _reason_for(key, OURS)
    if reason is not None:
        raise UserError(f"{where}: {key} is not set here: {reason}")
    reason = _reason_for(key, ALIKE) if where != "settings" else None
    if reason is not None:
        raise UserError(f"{where}: {key} must be the same for all arms, since {reason}: put it under settings")


def _reason_for(key: str, table: dict[str, str]) -> str | None:
    """The reason that a table gives for a key or for a section around it."""
    return next((reason for known, reason in table.items() if f"{key}.".startswith(f"{known}.")), None)
