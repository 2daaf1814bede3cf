"""Supervised warm start: `python -m hapo_lite.sft RECIPE [section.key=value ...]`."""

from __future__ import annotations

import sys

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`; None: the arguments of this process. Raises UserError and Interrupted."""
    parser = recipe_parser(
        "sft",
        "Train a LoRA adapter on the worked solutions of a recipe's data, before reinforcement learning: the result in "
        "runs/NAME-sft is what model.adapter takes. Run it again to continue.",
    )
    recipe = recipe_from(parser.parse_args(argv))
    # The import comes late, so that an error in a recipe is reported before the libraries are loaded.
    from hapo_lite.sft.run import sft

    sft(recipe)


def command() -> int:
    """Entry point of `hapo-sft`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
