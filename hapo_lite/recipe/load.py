"""Recipes from files, mappings and the command line; and the list of fields for --help."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError
from hapo_lite.recipe.fields import describe
from hapo_lite.recipe.schema import Recipe
from hapo_lite.recipe.settings import apply_override, read_mapping, validate


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides. Raises UserError with one sentence."""
    path = find_recipe(path)
    settings = read_recipe_file(path)
    if "arms" in settings:
        raise UserError(f"{path} compares several runs: use python -m hapo_lite.compare {path}")
    overrides = list(overrides)
    for override in overrides:
        apply_override(Recipe, settings, override)
    settings.setdefault("name", path.stem)
    return validate(Recipe, settings, str(path), overrides)


def find_recipe(path: str | Path) -> Path:
    """`path` itself, or the shipped recipe or comparison of that name where `path` is a plain name without a file.

    A plain name has neither a folder nor a suffix. Raises UserError if nothing shipped has that name.
    """
    path = Path(path)
    # os.path.isfile has no error for a name that is too long.
    if path.suffix or len(path.parts) != 1 or os.path.isfile(path):
        return path
    package = Path(str(files("hapo_lite")))
    # The wheel has the recipes within the package; a checkout has them beside it.
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if path.name not in shipped:
        raise UserError(f"there is no recipe at {path}; those that come with hapo_lite are {', '.join(shipped)}")
    return shipped[path.name]


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, not yet validated. Raises UserError with one sentence."""
    return read_mapping(path, "recipe", "`model:` and `training:`")


def parse_recipe(settings: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping. Raises UserError naming `where` and the first field that is wrong."""
    return validate(Recipe, settings, where)


def describe_fields() -> str:
    """Every field with its type, default and meaning, one line each, for --help."""
    return "recipe fields:\n" + describe(Recipe)
