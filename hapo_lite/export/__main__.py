"""Export a run: `python -m hapo_lite.export RUN --to merged|gguf-ready|adapter [--onto trained|original]`."""

from __future__ import annotations

import sys
from pathlib import Path

from hapo_lite.cli import CommandParser, program_name, run_command


def main(argv: list[str] | None = None) -> None:
    """Read the command line and export. argv: None for the arguments of this process. Raises UserError."""
    from hapo_lite.errors import page

    parser = CommandParser(
        prog=program_name("export"),
        description="Write a run's adapter as a model to pass on, with a model card, after comparing what was written "
        f"with the adapter on its base ({page('export.md')}).",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, such as runs/tiny_cpu")
    parser.add_argument(
        "--to",
        required=True,
        choices=("merged", "gguf-ready", "adapter"),
        help="merged: one model, no peft needed; gguf-ready: the same, checked for llama.cpp's converter; "
        "adapter: the adapter alone",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder to write; default: RUN/export/KIND")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a checkpoint of the run instead of its last adapter"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="dtype of the merged weights; auto: that of the base",
    )
    parser.add_argument(
        "--onto",
        choices=("trained", "original"),
        help="of a run on a 4-bit base: merge into that base, unpacked, which is what was trained, or into the "
        "original one; default: the one on which the adapter is nearer to what was trained",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to that repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: a public repository; default: private")
    parser.add_argument(
        "--dry-run", action="store_true", help="with --push: list what would be uploaded, without a network or a token"
    )
    arguments = parser.parse_args(argv)
    from hapo_lite.errors import UserError
    from hapo_lite.export.export import export
    from hapo_lite.export.merge import MergeSettings
    from hapo_lite.export.push import Push

    if arguments.push is None and (arguments.public or arguments.dry_run):
        raise UserError("--public and --dry-run are about an upload: give --push OWNER/NAME with them")
    push = Push(arguments.push, arguments.public, arguments.dry_run) if arguments.push is not None else None
    settings = MergeSettings(arguments.dtype, arguments.onto)
    export(arguments.run, arguments.to, arguments.output, arguments.adapter, settings, push)


def command() -> int:
    """Entry point of `hapo-export`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
