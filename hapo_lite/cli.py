"""Helpers of the command lines: the parser of a recipe, exit codes, and settings of libraries."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that torch reads the settings of its allocator on GPUs from."""

# Only what loads at once: Ctrl-C during the imports that take long then ends in a sentence (see `run_command`).
if TYPE_CHECKING:
    from hapo_lite.recipe import Recipe


class CommandParser(argparse.ArgumentParser):
    """A parser that takes settings and options in any order, and answers settings that are written as options."""

    # argparse declares four overloads.
    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):  # type: ignore[override]
        """See `argparse.ArgumentParser.parse_args`."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        start = "unrecognized arguments: "
        if message.startswith(start + "-"):
            from hapo_lite.recipe.elsewhere import answer_for

            option, _, value = message.removeprefix(start).split()[0].partition("=")
            setting = option.lstrip("-")
            if answer := answer_for(setting):
                message = f"{option} is not an option; {answer} (written section.key=value)"
            elif "." in setting:
                message = (
                    f"{option} is not an option: settings are written without dashes, {setting}={value or 'VALUE'}"
                )
        super().error(message)


def program_name(room: str) -> str:
    """The command that the user typed, for --help: `hapo-train`, `python app.py` or `python -m hapo_lite.train`.

    room: the folder of the command in hapo_lite/, such as `train`.
    """
    script = Path(sys.argv[0])
    if script.stem == f"hapo-{room.replace('_', '-')}":
        return script.stem
    if script.name == "app.py":
        return "python app.py"
    return f"python -m hapo_lite.{room}"


def recipe_parser(room: str, description: str) -> CommandParser:
    """A parser of RECIPE [section.key=value ...]. Its --help lists every field of a recipe."""
    from hapo_lite.recipe import describe_fields

    parser = CommandParser(
        prog=program_name(room),
        description=description,
        epilog=describe_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a recipe file, such as recipes/tiny_cpu.yaml, or the name of a shipped one, such as tiny_cpu",
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings to change for this run")
    return parser


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments of a `recipe_parser` name. Raises UserError."""
    from hapo_lite.recipe import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)


def run_command(command: Callable[[list[str] | None], object], argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, a UserError's own, or 128 + n after signal n.

    A shortage of memory counts as a UserError. argv: None takes the arguments of this process.
    """
    try:
        return _run(command, argv)
    except KeyboardInterrupt:
        print("stopped before anything was done", file=sys.stderr)
        return 130


def _run(command: Callable[[list[str] | None], object], argv: list[str] | None) -> int:
    from hapo_lite.errors import UserError, first_line
    from hapo_lite.runs.interrupt import Interrupted

    use_expandable_segments()
    keep_freed_memory()
    quiet_libraries()
    try:
        command(argv)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        saved = "all that was complete is saved: the same command continues from here"
        print(f"stopped by {stop}; {saved}", file=sys.stderr)
        return 128 + stop.number
    except (RuntimeError, MemoryError) as error:
        from hapo_lite.model.oom import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            f"error: memory ran out ({first_line(error)}): lower rollout.batch_size, rollout.max_new_tokens or "
            "training.micro_batch_tokens, or set model.gradient_checkpointing=true",
            file=sys.stderr,
        )
        return 2


QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""Variables that libraries read when they are imported. A value that the user has set stays."""


def quiet_libraries() -> None:
    """Keep the progress bars and hints of libraries off the terminal. Their errors still appear.

    No library is imported, which takes seconds, so that a mistake in a recipe is reported at once. A library that is
    imported already has read its variables, and is told by its own functions.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers, datasets = sys.modules.get("transformers"), sys.modules.get("datasets")
    if transformers is not None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if datasets is not None:
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()


def use_expandable_segments() -> None:
    """Let torch's allocator on GPUs grow its segments, unless the environment has settings of it.

    Batches of other shapes otherwise leave gaps in segments of a fixed size, which no larger tensor fits into. torch
    reads the variable when it is loaded, so call this function before that. vLLM reads the variable of this name too,
    and switches the setting off around its own pool of memory.
    """
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors, since each layer would otherwise fault the same pages in again.

    An iteration of the bundled recipe takes a tenth less time on a CPU (docs/measurements.md). Without glibc, this
    function has no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold = -1
    m_mmap_threshold = -3
    gibibyte = 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # Other C libraries, such as musl, have no mallopt.
    mallopt(m_mmap_threshold, gibibyte)
    mallopt(m_trim_threshold, gibibyte)
