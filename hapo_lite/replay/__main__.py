"""Replay a step that was skipped: `python -m hapo_lite.replay runs/NAME/replay/000012-3.safetensors`."""

from __future__ import annotations

import sys
from pathlib import Path

from hapo_lite.cli import CommandParser, program_name, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`; None: the arguments of this process. Raises UserError."""
    parser = CommandParser(
        prog=program_name("replay"),
        description="Look at what a skipped step was given, run its forward and backward again, micro-batch by "
        "micro-batch, and say where the first non-finite number arises.",
    )
    parser.add_argument("file", type=Path, help="a file of runs/NAME/replay/")
    arguments = parser.parse_args(argv)
    from hapo_lite.replay.replay import replay

    replay(arguments.file)


def command() -> int:
    """Entry point of `hapo-replay`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
