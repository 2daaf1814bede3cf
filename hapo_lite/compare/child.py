"""One run of a comparison, in a process of its own: the recipe comes as a line of JSON on standard input.

The comparison holds that pipe open as long as it lives. When the pipe closes, the run saves its state and ends, however
the comparison ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from hapo_lite.cli import run_command
from hapo_lite.recipe import parse_recipe


def main(_: list[str] | None = None) -> None:
    settings = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_comparison, daemon=True).start()
    from hapo_lite.train.run import train

    train(parse_recipe(settings))


def _end_with_the_comparison() -> None:
    # Reading from sys.stdin would hold a lock, which no thread may hold while the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run_command(main))
