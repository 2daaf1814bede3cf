"""Worked solutions of a data set as the texts that a model learns to write, each with its answer in a box."""

from __future__ import annotations

import re
from typing import Any

from hapo_lite.tasks.verify import marked_answer

_CALCULATOR = re.compile(r"<<[^<>=\n]*=[^<>\n]*>>")
"""GSM8K's calculator marks, such as <<48/2=24>> before the result."""
_FINAL = re.compile(r"(?:^|\n)[ \t]*####[ \t]*[^\n]*\s*$")
"""GSM8K's last line, #### and the answer."""


def worked_solution(value: Any, answer: str) -> str:
    """The solution in a column's value, ending in the boxed answer; "" where there is no working to learn from.

    answer: the gold answer. GSM8K's calculator marks are removed, and its last line becomes the box. Another solution
    stays as it is, and a sentence with the box follows if it marks no answer of its own.
    """
    if not isinstance(value, str):
        return ""
    box = rf"\boxed{{{answer}}}"
    text = _CALCULATOR.sub("", value).strip()
    body, finals = _FINAL.subn("", text)
    body = body.strip()
    if body.strip("$. \n") in ("", answer, box):
        return ""
    if finals:
        return f"{body}\n{box}"
    return body if marked_answer(body) is not None else f"{body}\nThe answer is {box}."
