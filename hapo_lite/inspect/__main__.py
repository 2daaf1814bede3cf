"""The inspector: `python app.py [--run runs/NAME]` shows what HAPO does to every token.

It reads traces and runs single generations. The rest of this room makes what it shows; `tabs/` puts that on a page.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hapo_lite.cli import program_name, run_command


def serve(argv: list[str] | None = None, block: bool = True):
    """Start the inspector; returns its gradio page and its address. block: until Ctrl-C."""
    parser = argparse.ArgumentParser(prog=program_name("inspect"), description="See what HAPO does to every token.")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run to open, such as runs/tiny_cpu")
    parser.add_argument("--model", default="", metavar="NAME_OR_PATH", help="hub name, folder, or tiny (bundled)")
    parser.add_argument("--adapter", default="", metavar="DIR", help="a trained adapter, such as runs/tiny_cpu/adapter")
    parser.add_argument("--port", type=int, default=7860, help="0: the first from 7860 on that is free")
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 keeps it on this machine")
    arguments = parser.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Imported late: gradio reads these when it is imported.
    from hapo_lite.inspect.tabs.desk import Desk
    from hapo_lite.inspect.tabs.page import launch

    return launch(Desk(arguments.model, arguments.adapter, arguments.run), arguments.host, arguments.port, block)


def command() -> int:
    """Entry point of `hapo-inspect`; returns the exit code."""
    return run_command(serve)


if __name__ == "__main__":
    sys.exit(command())
