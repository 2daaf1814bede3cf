"""One run of a comparison, in a process of its own: the recipe comes as a line of JSON on standard input.

That pipe stays open as long as the comparison lives. When it closes, however the comparison ended, the run saves what
it has and ends as well.
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
    # The descriptor and not sys.stdin, whose lock a thread may not hold while the interpreter ends.
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run_command(main))
