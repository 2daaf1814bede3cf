"""Measure pass rates of the training prompts: `python -m hapo_lite.probe RECIPE [-k 8] [--adapter DIR] [key=value]`."""

from __future__ import annotations

import sys

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    parser = recipe_parser(
        "probe",
        "How often each prompt of data.source is solved by the model that the recipe starts from, sampled as training "
        "samples. Results go to runs/NAME/probe/; data.pass_rate.file reads them. Run it again to continue.",
    )
    parser.add_argument(
        "-k", type=int, metavar="K", help="completions of each prompt; without it rollout.completions_per_prompt"
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="an adapter, a run or a checkpoint to measure with; without it model.adapter, or the base alone",
    )
    arguments = parser.parse_args(argv)
    recipe = recipe_from(arguments)
    from hapo_lite.probe.probing import probe

    probe(recipe, arguments.k, arguments.adapter)


def command() -> int:
    """Entry point of `hapo-probe`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
