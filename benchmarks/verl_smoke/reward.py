"""verl's reward function: the kit's own grader."""

from __future__ import annotations

from typing import Any

from hapo_lite.tasks.verify import grade


def compute_score(data_source: str, solution_str: str, ground_truth: str, **unused: Any) -> float:
    return float(grade(solution_str, ground_truth).correct)
