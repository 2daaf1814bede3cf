"""`metrics.jsonl`: one line per iteration, one JSON object on each line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hapo_lite.runs.files import replace_text

CLOCK = ("seconds/", "tokens_per_second/", "memory/")
"""Prefixes of metrics that depend on the clock or the process."""
LONGEST_LINE = 1 << 16
"""Number of bytes at the end of metrics.jsonl that are sure to hold its last whole line."""


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A metrics line without the metrics that depend on the clock or the process. It is the same in a repeated run."""
    return {key: value for key, value in line.items() if not key.startswith(CLOCK)}


class MetricsFile:
    """`metrics.jsonl` at `path`. The line of iteration 0 is about the policy before training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, metrics: dict[str, Any]) -> None:
        """Add a line, and wait until it is on the disk. Raises OSError."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line. A last line that was cut off by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def last(self) -> dict[str, Any]:
        """The last whole line; empty without one. The other lines are not read."""
        if not self.path.is_file():
            return {}
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - LONGEST_LINE))
            tail = file.read().decode("utf-8", errors="replace").splitlines()
        for line in reversed(tail):
            try:
                return json.loads(line)
            except ValueError:
                continue
        return {}

    def keep_up_to(self, iteration: int) -> None:
        """Drop the lines after `iteration`, which a resumed run writes again. Raises OSError."""
        kept = [line for line in self.read() if line["iteration"] <= iteration]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
