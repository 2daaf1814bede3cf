"""Train a recipe: `python -m hapo_lite.train RECIPE [section.key=value ...]`."""

from __future__ import annotations

import sys

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`; None: the arguments of this process. Raises UserError and Interrupted."""
    parser = recipe_parser("train", "Train a LoRA adapter with HAPO or another method. Run it again to continue a run.")
    recipe = recipe_from(parser.parse_args(argv))
    # The import comes late, so that an error in a recipe is reported before the libraries are loaded.
    from hapo_lite.train.run import train

    train(recipe)


def command() -> int:
    """Entry point of `hapo-train`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
