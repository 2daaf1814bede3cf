"""`status.json`: what a run is doing at this moment, and the lock that keeps a second run out of its folder.

The lock is the system's (flock): it ends with the process that holds it, however that ends, so none is ever left over.
It is held by the handle that writes the record. The package filelock shares no handle, and ends with an error on a file
system without locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
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
"""Bytes that a record is padded to. It is overwritten in place: a file put in its place would not be locked."""


@dataclass
class Doing:
    """process, host: who runs. stage: what it is doing, in which iteration. entered, seconds: of each stage so far.

    about: what the stage is part of, such as "4 of 16 groups kept". progress: the fields of `progress.Numbers`, of this
    process alone; None where the stage counts nothing.
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
    """Holds a run's folder from `claim`, or from entering the context if the folder is there, to its end.

    path: of status.json; None keeps no record and no lock, as processes that do not write must not.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.doing = Doing(os.getpid(), socket.gethostname())
        self._handle: int | None = None
        self._since = time.perf_counter()
        self._size = 0
        # Stages are entered by the run, and their numbers noted by the display's thread. Reentrant, since a signal may
        # end the run's own thread between taking the lock and the block that releases it.
        self._lock = threading.RLock()

    def __enter__(self) -> Status:
        if self.path is not None and self.path.parent.is_dir():
            self.claim()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.enter(ENDED[kind is not None])
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def claim(self) -> None:
        """Take the lock. Raises UserError if another process has it, naming that process and what it is doing."""
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
            pass  # Some network file systems have no locks; that is no reason not to train.
        os.ftruncate(handle, 0)
        self._handle = handle
        with self._lock:
            self._write()

    def enter(self, stage: str) -> None:
        """Note that `stage` begins, and so that the one before it has ended."""
        now, doing = time.perf_counter(), self.doing
        with self._lock:
            doing.seconds[doing.stage] = round(doing.seconds.get(doing.stage, 0.0) + now - self._since, 6)
            doing.entered[stage] = doing.entered.get(stage, 0) + 1
            doing.stage, doing.about, doing.progress, self._since = stage, "", None, now
            self._write()

    def note(self, stage: str, about: str, numbers: Numbers | None) -> None:
        """Note how far `stage` is. Without effect where another one has been entered since."""
        known = {} if numbers is None else asdict(numbers)
        progress = {key: round(v, 1) if isinstance(v, float) else v for key, v in known.items()} or None
        with self._lock:
            doing = self.doing
            if doing.stage == stage and (doing.about, doing.progress) != (about, progress):
                doing.about, doing.progress = about, progress
                self._write()

    def _write(self) -> None:
        if self._handle is None:
            return
        text = json.dumps(asdict(self.doing)) + "\n"
        # Never less than before: what a longer record left behind this one would break it.
        self._size = max(self._size, -(-len(text) // BLOCK) * BLOCK)
        # A full disk is reported by the files that matter.
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, text.rjust(self._size).encode(), 0)


def read_status(path: Path) -> Doing | None:
    """What the run that writes `path` is doing, or did last; None where there is none or it cannot be read."""
    try:
        return Doing(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
