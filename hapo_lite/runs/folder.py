"""A run's folder: the paths in it, and the checks before a run is started or continued in it."""

from __future__ import annotations

import datetime
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hapo_lite.errors import UserError, writing
from hapo_lite.recipe import Recipe, first_incompatible_setting, parse_recipe
from hapo_lite.runs.checkpoint import list_checkpoints
from hapo_lite.runs.files import inside, replace_text
from hapo_lite.runs.lines import MetricsFile
from hapo_lite.runs.status import Status


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.path / "metrics.jsonl")

    @property
    def traces(self) -> Path:
        return self.path / "traces"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def replay(self) -> Path:
        return self.path / "replay"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @classmethod
    def holding(cls, adapter: str) -> RunFolder:
        """The folder of the run that an adapter is from: itself, its adapter/, or one of its checkpoints."""
        place = Path(adapter).resolve()
        if place.name == "adapter":
            return cls(place.parent)
        return cls(place.parents[1] if place.parent.name == "checkpoints" else place)


def recipe_behind(adapter: str | None) -> Recipe | None:
    """The recipe of the run that `model.adapter` goes on from; None where it is not known."""
    try:
        return parse_recipe(recipe_of(RunFolder.holding(adapter))) if adapter else None
    except UserError:
        return None


OURS = ("recipe.yaml", "status.json", "metrics.jsonl", "traces", "checkpoints", "adapter", "evaluations", "probe")
"""Names by which a run's folder is recognised."""


def nearest_run(folder: RunFolder) -> str:
    """A clause in brackets with the run beside `folder` whose name is the nearest; "" if there is none like it."""
    beside = sorted(found.parent.name for found in folder.path.parent.glob("*/recipe.yaml"))
    close = difflib.get_close_matches(folder.path.name, beside, n=1, cutoff=0.5)
    return f" (did you mean name={close[0]}?)" if close else ""


def check_place(folder: RunFolder) -> None:
    """Raise UserError for a folder that holds something else than a run, or links that lead out of it.

    A run replaces and deletes files in its folder, and through a link it would do so elsewhere.
    """
    path = folder.path
    inside(path.parent, path)
    if not path.is_dir():
        return
    with writing(path):
        names = {entry.name for entry in path.iterdir()}
    if names and names.isdisjoint(OURS):
        raise UserError(f"{path} holds other things than a run: choose another name= or output_dir=")
    for place, folders, files in os.walk(path):
        for name in folders + files:
            if os.path.islink(os.path.join(place, name)):
                inside(path, Path(place, name))


def open_folder(folder: RunFolder, recipe: Recipe, status: Status) -> None:
    """Make the folder, lock it and write the recipe. Raises UserError if it is in use or cannot be written."""
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        status.claim()
        replace_text(folder.recipe, recipe.to_yaml())


def check_same_run(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UserError if the folder holds a run of another recipe, or any run with checkpoint.resume=never.

    Raises it too if the records of a run are there without the checkpoints that it has written, since a run that starts
    again removes them. A run that was killed before its first checkpoint starts again.
    """
    begun, finished = bool(list_checkpoints(folder.checkpoints)), folder.summary.is_file()
    recorded = folder.metrics.last()
    if not (begun or finished or recorded):
        return
    if recipe.checkpoint.resume == "never":
        raise UserError(
            f"{folder.path} holds a run already: choose another name=, move this folder away, or set "
            "checkpoint.resume=auto to go on"
        )
    if changed := changed_setting(folder, recipe):
        raise UserError(
            f"{folder.path} was made with {changed}: choose another name= to start a new run, or "
            "move this folder away to start again under the same name"
        )
    if begun:
        return
    every, last = parse_recipe(recipe_of(folder)).checkpoint.every, recorded.get("iteration", 0)
    if finished or 0 < every < last:
        reached = "to its end" if finished else f"up to iteration {last}"
        raise UserError(
            f"{folder.path} holds the records of a run {reached} and no checkpoint to go on from: put its checkpoints/ "
            "back to go on, or choose another name= or move this folder away to start again"
        )


def with_date_of(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The recipe with the date that the folder's run gives its chat template, unless the recipe names a date.

    A run writes the date into its recipe.yaml if its template reads one.
    """
    if recipe.model.chat_template_date is not None or not folder.recipe.is_file():
        return recipe
    try:
        before = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
        date = before["model"].get("chat_template_date")
        return with_date(recipe, datetime.date.fromisoformat(date)) if date else recipe
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return recipe  # `check_same_run` and the reader of the recipe say what is wrong with the file.


def with_date(recipe: Recipe, date: datetime.date) -> Recipe:
    """The recipe with `date` as its model.chat_template_date."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"chat_template_date": date})})


def changed_setting(folder: RunFolder, recipe: Recipe) -> str | None:
    """The first setting by which `recipe` differs from the folder's run; None if it makes the same run.

    Raises UserError if the folder's recipe cannot be read.
    """
    return first_incompatible_setting(recipe_of(folder), recipe)


def recipe_of(folder: RunFolder) -> dict[str, Any]:
    """The recipe of the folder's run, as a mapping. Raises UserError if it cannot be read."""
    try:
        return yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder.recipe}, which the run is to be continued from, cannot be read: {error}") from None
