"""`metrics.jsonl` of a run that may still write it: each look reads what has been added since the last one.

A run that resumes puts a shorter file in its place (`runs.lines.MetricsFile.keep_up_to`). The file is then read anew.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

FileId = tuple[int, int]
"""Device and number of a file, which stay while lines are added to it."""


class MetricsLog:
    """The file at `path`, and what has been read of it.

    lines: those that have an iteration. problems: a sentence for every other line. read_bytes: bytes read in all looks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_bytes = 0
        self._lines: list[dict[str, Any]] = []
        self._unfinished: list[dict[str, Any]] = []
        self._problems: list[str] = []
        self._forget()

    def look(self, path: Path) -> None:
        """Read what is new. path: that of the file, with links followed. Raises OSError."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            found = (status.st_dev, status.st_ino)
            if not self._goes_on(file, found, status.st_size):
                self._forget(found)
                file.seek(0)
            added = file.read()
        self.read_bytes += len(added)
        *whole, rest = added.split(b"\n")
        for line in whole:
            self._add(line)
        # The run may be in the middle of the last line. The next look reads it again.
        fields = _metrics(rest)
        self._unfinished = [fields] if fields is not None else []

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines so far, in the order of the file."""
        return [*self._lines, *self._unfinished]

    @property
    def problems(self) -> list[str]:
        """The sentences so far. A last line without an end is not among them."""
        return list(self._problems)

    def _goes_on(self, file: BinaryIO, found: FileId, size: int) -> bool:
        """Whether the file is the one that was read, and still has the last line that was read in its place.

        The file then stands behind that line.
        """
        if found != self._file or size < self._offset:
            return False
        file.seek(self._offset - len(self._last))
        last = file.read(len(self._last))
        self.read_bytes += len(last)
        return last == self._last

    def _add(self, line: bytes) -> None:
        self._count += 1
        self._offset += len(line) + 1
        self._last = line + b"\n"
        fields = _metrics(line)
        if fields is None:
            self._problems.append(f"{self.path}:{self._count}: not a line of metrics")
        else:
            self._lines.append(fields)

    def _forget(self, file: FileId | None = None) -> None:
        """Begin anew, with a file of which nothing has been read."""
        self._file = file
        self._offset = self._count = 0
        self._last = b""
        self._lines.clear()
        self._problems.clear()


def _metrics(line: bytes) -> dict[str, Any] | None:
    """The fields of a line that has an iteration; None for any other line."""
    try:
        fields = json.loads(line)
        return fields if math.isfinite(fields["iteration"]) else None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
