"""Predict and measure a recipe's memory: `python -m hapo_lite.preflight RECIPE [section.key=value ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`; None: the arguments of this process. Raises UserError."""
    from hapo_lite.errors import UserError
    from hapo_lite.recipe import find_recipe

    parser = recipe_parser(
        "preflight",
        "Run a recipe's worst iteration, show where memory and time go, and suggest settings that fit the card.",
    )
    parser.add_argument(
        "--shape-only", action="store_true", help="predict from the model's config.json: no weights, no GPU needed"
    )
    parser.add_argument("--card", type=float, metavar="GIB", help="memory to fit, GiB; default: this machine's")
    parser.add_argument("--write", action="store_true", help="put the suggested settings into the recipe file")
    arguments = parser.parse_args(argv)
    if arguments.card is not None and not arguments.card > 0:
        raise UserError(f"--card {arguments.card:g} must be above 0 GiB")
    if arguments.write and arguments.overrides:
        raise UserError("--write writes what fits the recipe file as it is: put the overrides into the file first")
    recipe = recipe_from(arguments)
    path = Path(arguments.recipe)
    if arguments.write and not path.is_file():
        raise UserError(f"--write changes a file of your own: copy the shipped {find_recipe(path)} and name the copy")
    from hapo_lite.preflight.preflight import preflight

    card = None if arguments.card is None else int(arguments.card * 2**30)
    preflight(recipe, card, arguments.shape_only, path if arguments.write else None)


def command() -> int:
    """Entry point of `hapo-preflight`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
