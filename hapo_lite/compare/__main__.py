"""Compare methods at equal tokens: `python -m hapo_lite.compare COMPARISON [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from hapo_lite.cli import CommandParser, program_name, run_command


def main(argv: list[str] | None = None) -> None:
    from hapo_lite.compare.plan import Comparison, load_comparison, planned_runs
    from hapo_lite.errors import UserError
    from hapo_lite.recipe.fields import describe

    parser = CommandParser(
        prog=program_name("compare"),
        description="Train several methods with several seeds at equal tokens, and report how they differ. "
        "Run it again to go on after an interruption.",
        epilog="fields of a comparison:\n" + describe(Comparison) + "\nany other key changes the recipe of all arms",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "comparison",
        metavar="FILE",
        help="a comparison, such as recipes/compare_tiny.yaml, or the name of a shipped one, such as compare_tiny",
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings to change")
    parser.add_argument("--report", action="store_true", help="train nothing: report on the runs that are complete")
    arguments = parser.parse_args(argv)
    comparison = load_comparison(arguments.comparison, arguments.overrides)
    runs = planned_runs(comparison)
    # Imported late: a typo is reported before the libraries have been loaded.
    from hapo_lite.compare.arms import run_all
    from hapo_lite.compare.report import write_report

    failed = {} if arguments.report else run_all(comparison, runs)
    write_report(comparison, runs, failed)
    if failed:
        first = f"{next(iter(failed))}: {next(iter(failed.values()))}"
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, {first}; the same command tries them again")


def command() -> int:
    """Entry point of `hapo-compare`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
