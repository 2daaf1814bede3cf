"""Train a recipe: `python -m hapo_lite.train RECIPE [section.key=value ...]`."""

from __future__ import annotations

import sys

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    parser = recipe_parser("train", "Train a LoRA adapter with HAPO, DAPO or GRPO. Run it again to continue a run.")
    recipe = recipe_from(parser.parse_args(argv))
    # Imported late: a typo in a recipe is reported before the libraries have been loaded.
    from hapo_lite.train.run import train

    train(recipe)


def command() -> int:
    """Entry point of `hapo-train`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
