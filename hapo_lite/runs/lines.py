"""`metrics.jsonl`: one JSON object a line, one line an iteration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hapo_lite.runs.files import replace_text

CLOCK = ("seconds/", "tokens_per_second/", "memory/")


LONGEST_LINE = 1 << 16
"""Bytes at the end of metrics.jsonl that hold its last whole line."""


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A metrics line without what depends on the clock or the process: the same whenever the run is repeated."""
    return {key: value for key, value in line.items() if not key.startswith(CLOCK)}


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, one line an iteration; line 0 is the state before training."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, metrics: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Every whole line. The last one may be cut off by a kill; it is left out."""
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
        """The last whole line, without reading the others; empty if there is none."""
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
        """Drop the lines that a run resumed after `iteration` will write again."""
        kept = [line for line in self.read() if line["iteration"] <= iteration]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
