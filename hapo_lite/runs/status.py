"""`status.json`: what a run is doing at this moment, and the lock that keeps a second run out of its folder.

The lock is the system's (flock). It ends with the process that holds it, however the process ends, so no stale lock is
left over. The file handle that writes the record also holds the lock. The package filelock cannot share a handle, and
raises an error on a file system without locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError, writing
from hapo_lite.runs.progress import Numbers

ENDED = ("finished", "stopped")
"""Stages of a run that is over."""
BLOCK = 2048
"""A record is padded to a multiple of this many bytes. It is overwritten in place, as a new file would have no lock."""


@dataclass
class Doing:
    """What a run is doing. process, host: identify its main process. iteration, stage: the current ones.

    entered: how often each stage has begun. seconds: how long each stage has lasted in all. about: details of the
    stage, such as "4 of 16 groups kept". progress: the fields of `progress.Numbers` for this process; None for a stage
    that counts nothing.
    """

    process: int = 0
    host: str = ""
    iteration: int = 0
    stage: str = "starting"
    entered: dict[str, int] = field(default_factory=lambda: {"starting": 1})
    seconds: dict[str, float] = field(default_factory=dict)
    about: str = ""
    progress: dict[str, Any] | None = None


class Status:
    """A context that writes status.json and holds the folder's lock to its end.

    It takes the lock at `claim`, or on entry if the folder exists. path: of status.json; None, for processes other than
    the main one: there is no record and no lock.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.doing = Doing(os.getpid(), socket.gethostname())
        self._handle: int | None = None
        self._since = time.perf_counter()
        self._size = 0
        # The run's thread enters stages, and the display's thread notes progress. The lock is reentrant, since a signal
        # may raise in the run's thread after it takes the lock and before the block that releases it.
        self._lock = threading.RLock()

    def __enter__(self) -> Status:
        if self.path is not None and self.path.parent.is_dir():
            self.claim()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        finished, stopped = ENDED
        self.enter(finished if kind is None else stopped)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def claim(self) -> None:
        """Take the lock. Raises UserError if another process has it, naming the process and its iteration."""
        if self.path is None or self._handle is not None:
            return
        with writing(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            other = read_status(self.path)
            who = f"process {other.process} on {other.host}, in iteration {other.iteration}" if other else "another run"
            raise UserError(
                f"{self.path.parent} is in use by {who}: wait until it has ended, or choose another name="
            ) from None
        except OSError:
            pass  # Some network file systems have no locks. The run goes on without one.
        os.ftruncate(handle, 0)
        self._handle = handle
        with self._lock:
            self._write()

    def enter(self, stage: str) -> None:
        """Record that `stage` begins, which ends the one before it."""
        now = time.perf_counter()
        doing = self.doing
        with self._lock:
            doing.seconds[doing.stage] = round(doing.seconds.get(doing.stage, 0.0) + now - self._since, 6)
            doing.entered[stage] = doing.entered.get(stage, 0) + 1
            doing.stage = stage
            doing.about = ""
            doing.progress = None
            self._since = now
            self._write()

    def note(self, stage: str, about: str, numbers: Numbers | None) -> None:
        """Record the progress of `stage`. Does nothing if another stage has begun since."""
        progress = None
        if numbers is not None:
            progress = {key: round(v, 1) if isinstance(v, float) else v for key, v in asdict(numbers).items()}
        with self._lock:
            doing = self.doing
            if doing.stage == stage and (doing.about, doing.progress) != (about, progress):
                doing.about = about
                doing.progress = progress
                self._write()

    def _write(self) -> None:
        if self._handle is None:
            return
        text = json.dumps(asdict(self.doing)) + "\n"
        # The size never shrinks, since the rest of a longer record would remain behind this one.
        self._size = max(self._size, math.ceil(len(text) / BLOCK) * BLOCK)
        # The files that matter report a full disk.
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, text.rjust(self._size).encode(), 0)


def read_status(path: Path) -> Doing | None:
    """What the run that writes `path` is doing, or did last; None if the file is missing or cannot be read."""
    try:
        return Doing(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
