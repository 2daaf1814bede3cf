"""One run of a comparison, in a process of its own. A line of JSON on standard input says which.

recipe: its settings. measured: the folder of a run whose evaluation before training is this one's too, or null.

The comparison holds that pipe open as long as it lives. When the pipe closes, the run saves its state and ends, however
the comparison ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from hapo_lite.cli import run_command
from hapo_lite.recipe import parse_recipe
from hapo_lite.runs.folder import RunFolder


def main(_: list[str] | None = None) -> None:
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_comparison, daemon=True).start()
    from hapo_lite.train.run import train

    train(parse_recipe(order["recipe"]), order["measured"] and RunFolder(Path(order["measured"])))


def _end_with_the_comparison() -> None:
    # Reading from sys.stdin would hold a lock, which no thread may hold while the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run_command(main))
