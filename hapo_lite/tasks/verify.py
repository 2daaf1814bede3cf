"""Grading a completion against a gold answer: the names that others import.

`answers` finds the answer in a text and settles plain cases; `grader` has the processes that settle the others.
"""

from __future__ import annotations

import atexit
import threading

from hapo_lite.tasks.answers import LONGEST_ANSWER, Grade, Outcome, boxed_answer, marked_answer
from hapo_lite.tasks.grader import GraderPool
from hapo_lite.tasks.notation import normal_form

__all__ = ["LONGEST_ANSWER", "Grade", "GraderPool", "Outcome", "boxed_answer", "grade", "marked_answer", "normal_form"]

_shared: GraderPool | None = None
_shared_lock = threading.Lock()


def grade(completion_text: str, gold: str, timeout_s: float = 5.0) -> Grade:
    """Grade one completion. Any thread may call it. timeout_s: deadline of the comparison, seconds."""
    return _shared_pool().grade_many([(completion_text, gold)], timeout_s)[0]


def _shared_pool() -> GraderPool:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = GraderPool(workers=1)
            atexit.register(_shared.close)
        return _shared
