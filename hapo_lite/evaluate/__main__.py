"""Evaluate a base and its adapter: `python -m hapo_lite.evaluate RECIPE [--suite NAME] [--adapter DIR] [key=value]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    parser = recipe_parser(
        "evaluate",
        "avg@n, pass@k and maj@k of the base and of the run's adapter on the same prompts, with intervals. Results go "
        "to runs/NAME/evaluations/. Run it again to continue.",
    )
    parser.add_argument(
        "--suite",
        action="append",
        metavar="NAME",
        help="aime24, aime25, amc23, math500, minerva, olympiadbench, gsm8k, tiny, tiny_sums, held_out, a file, or "
        "NAME=FILE; may be given several times; without it benchmark.suites",
    )
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="an adapter or a checkpoint; without it that of the recipe's run"
    )
    arguments = parser.parse_args(argv)
    if arguments.suite:
        arguments.overrides.append(f"benchmark.suites={json.dumps(arguments.suite)}")
    recipe = recipe_from(arguments)
    from hapo_lite.evaluate.evaluation import evaluate

    evaluate(recipe, arguments.adapter)


def command() -> int:
    """Entry point of `hapo-evaluate`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
