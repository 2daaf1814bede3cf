"""The grading process: `python -m hapo_lite.tasks._grader`, driven by grader.GraderPool over its pipes.

It writes one line when ready, then answers each JSON line {gold, seconds, and answer and value, or text} with
{outcome, answer}.
It imports math-verify and nothing heavier. It may be killed at any moment, and it ends by itself: when its standard
input closes, when its parent is gone, and at the latest `seconds` into a request, by an alarm without a handler, which
ends even a process deep in sympy.

What a model wrote is computed with here and nowhere else, and math-verify has Python compute arithmetic that it finds
in running text. So the process is confined: memory has a limit, and it can start no program, open no connection and
write no file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import select
import signal
import sys
from contextlib import suppress
from typing import Any

from hapo_lite.tasks import plain
from hapo_lite.tasks.answers import CHARACTERS_BEFORE, LONGEST_ANSWER, is_a_term
from hapo_lite.tasks.comparison import Comparison
from hapo_lite.tasks.notation import tidy
from hapo_lite.tasks.shapes import parse as parse_shape
from hapo_lite.tasks.units import unit_of, words_before_change_value, words_change_value

MEMORY_BYTES = 1 << 30
"""Address space of one process; grading takes 70 MiB of it."""
_REFUSED = (
    *("subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "os.system", "os.exec", "os.spawn", "os.posix_spawn"),
    *("os.fork", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.putenv"),
)
"""Prefixes of the names of the audit events that the process refuses."""
_WORD_BEHIND = re.compile(r"(\s*)([A-Za-z]+)")
CHARACTERS_BEHIND = 40
"""Characters behind a number in running text whose words are taken to belong to the number."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may want to save a checkpoint.
    parent = os.getppid()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    logging.disable(logging.CRITICAL)
    # One request takes both ways here, so that no deadline pays for imports.
    judge({"gold": r"\frac{1}{2}", "answer": r"\frac{x+1}{2x+2}"})
    judge({"gold": r"\frac{1}{2}", "text": "It is $x$."})
    confine()
    os.dup2(nowhere, 2)
    print("{}", file=out)
    while True:
        while not select.select([0], [], [], 10.0)[0]:
            if os.getppid() != parent:
                return
        line = sys.stdin.buffer.readline()
        if not line:
            return
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            reply = judge(request)
        except Exception:
            reply = {"outcome": "error"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=out)


def confine() -> None:
    """Limit this process's memory, and refuse what reading an answer never needs. Neither can be undone."""
    for limit, amount in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS has no limit of the address space.
            resource.setrlimit(limit, (amount, amount))
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    opened_to_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if opened_to_write or event.startswith(_REFUSED):
        raise PermissionError(f"a grading process does nothing like {event}")


def judge(request: dict[str, Any]) -> dict[str, str]:
    """The outcome of one request, and the answer where it was found in `text` rather than given."""
    gold = request["gold"]
    if "text" not in request:
        right = any(same(gold, request[key]) for key in ("answer", "value") if key in request)
        return {"outcome": "correct" if right else "wrong"}
    text = request["text"]
    found = answer_in(text)
    if found is None:
        return {"outcome": "unparseable"}
    right = not is_a_term(found, text) and _right_in_text(gold, found, text)
    return {"outcome": "correct" if right else "wrong", "answer": found[:LONGEST_ANSWER]}


def _right_in_text(gold: str, found: str, text: str) -> bool:
    """Whether a value found in running text is the gold answer. The words around the value are read too."""
    before, stands_there, rest = text.rpartition(found)
    if stands_there and words_before_change_value(before[-CHARACTERS_BEFORE:]):
        return False
    behind = rest[:CHARACTERS_BEHIND] if stands_there else ""
    measured = found
    match = _WORD_BEHIND.match(behind)
    if match is not None:
        space, word = match.groups()
        unit = unit_of(word)
        if not space and (unit is None or len(word) == 1):
            return False  # 6t is not 6
        if unit is not None:
            measured = rf"{found} \text{{{word}}}"
    return not words_change_value(behind) and same(gold, tidy(measured))


def answer_in(text: str) -> str | None:
    """The last answer that math-verify finds in running text, None where it finds none."""
    from math_verify import parse

    found = parse(text, parsing_timeout=None)
    return str(found[-1]) if found else None


def same(gold: str, answer: str) -> bool:
    """Whether two answers in tidy notation are the same."""
    from hapo_lite.tasks.algebra import VALUES

    settled = plain.settled(answer, gold)
    return Comparison(VALUES).same(parse_shape(gold), parse_shape(answer)) if settled is None else settled


if __name__ == "__main__":
    main()
