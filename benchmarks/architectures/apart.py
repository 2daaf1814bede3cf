"""Runs a step in a process of its own with a deadline. The process is forked, so nothing is imported again."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.architectures.trial import Done

LOOK_S = 0.02


def apart(step: Callable[[], int], log: Path, deadline_s: float) -> Done:
    """How a step ends whose output goes to the file `log`. It and its own processes are killed at the deadline."""
    pid = os.fork()
    if pid == 0:
        _become(step, log)
    ends = time.monotonic() + deadline_s
    code: int | None = None
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(LOOK_S)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return Done(code, log.read_text(encoding="utf-8", errors="replace"))


def _become(step: Callable[[], int], log: Path) -> None:
    """The child's life. It never returns."""
    code = 1
    try:
        os.setsid()
        with log.open("w", encoding="utf-8") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (it lives as long as the process)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        code = step()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
