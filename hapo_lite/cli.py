"""What the command lines share: quiet libraries, and errors as one sentence with an exit code."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import sys
from collections.abc import Callable

from hapo_lite.errors import UserError
from hapo_lite.recipe import Recipe, describe_fields, load_recipe
from hapo_lite.runs.interrupt import Interrupted


def recipe_parser(program: str, description: str) -> argparse.ArgumentParser:
    """RECIPE [section.key=value ...], with every field of the recipe in --help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m hapo_lite.{program}",
        description=description,
        epilog=describe_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, such as recipes/tiny_cpu.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings to change for this run")
    return parser


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, arguments.overrides)


def run_command(command: Callable[[list[str] | None], object], argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 2 for a UserError, 128 + n after signal n."""
    keep_freed_memory()
    quiet_libraries()
    try:
        command(argv)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"stopped by {stop}; saved: the same command continues from here", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped before anything was done", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        from hapo_lite.model.oom import is_shortage

        if not is_shortage(error):
            raise
        first = str(error).strip().partition("\n")[0]
        print(
            f"error: memory ran out ({first}): lower rollout.batch_size, rollout.max_new_tokens or "
            "training.micro_batch_tokens, or set model.gradient_checkpointing=true",
            file=sys.stderr,
        )
        return 2


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and hints off the terminal; their errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensors instead of handing their pages back, to be faulted in again at the next layer.

    On a CPU this takes a tenth off an iteration of the bundled recipe (docs/measurements.md). Elsewhere a no-op.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold, gibibyte = -1, -3, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # musl and others have no mallopt.
    mallopt(m_mmap_threshold, gibibyte)
    mallopt(m_trim_threshold, gibibyte)
