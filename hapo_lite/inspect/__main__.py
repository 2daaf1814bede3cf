"""The inspector: `python app.py [--run runs/NAME]` shows what HAPO does to every token.

The inspector reads traces and runs single generations. `tabs/` builds its page from the other modules of this room.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hapo_lite.cli import CommandParser, program_name, run_command

if TYPE_CHECKING:
    import gradio as gr


def serve(argv: list[str] | None = None, block: bool = True) -> tuple[gr.Blocks, str]:
    """Start the inspector, and return its gradio page with its address.

    argv: the command line; None: that of this process. block: return only after Ctrl-C. Raises UserError if the run
    cannot be opened or the port is in use.
    """
    parser = CommandParser(prog=program_name("inspect"), description="See what HAPO does to every token.")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run to open, such as runs/tiny_cpu")
    parser.add_argument(
        "--model", default="", metavar="NAME_OR_PATH", help="hub name, folder, or a bundled one: tiny, tiny_sums"
    )
    parser.add_argument("--adapter", default="", metavar="DIR", help="a trained adapter, such as runs/tiny_cpu/adapter")
    parser.add_argument("--port", type=int, default=7860, help="0: the first free port from 7860 on")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 admits only this machine")
    arguments = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Gradio reads these variables when it is imported, so its import comes after them.
    from hapo_lite.inspect.tabs.page import launch
    from hapo_lite.inspect.tabs.state import AppState

    return launch(AppState(arguments.model, arguments.adapter, arguments.run), arguments.host, arguments.port, block)


def command() -> int:
    """Entry point of `hapo-inspect`; returns the exit code."""
    return run_command(serve)


if __name__ == "__main__":
    sys.exit(command())
