"""docs/models.md, written from what has been found of the families."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.architectures.trial import Report

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COMMANDS = ("evaluate", "export", "preflight")


def page_of(reports: Sequence[Report]) -> str:
    """The whole page."""
    trains = [r for r in reports if r.results.get("train") == "ran"]
    refused = [r for r in reports if r.results.get("train") == "refused"]
    rest = [r for r in reports if r not in trains and r not in refused]
    return ""
