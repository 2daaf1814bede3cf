"""The grading process: `python -m hapo_lite.tasks._grader`, driven by grader.GraderPool over its pipes.

It writes one line when ready, then answers each JSON line {gold, answer and/or text, seconds} with {outcome, answer}.
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

from hapo_lite.tasks import plain
from hapo_lite.tasks.answers import LONGEST_ANSWER, is_a_term
from hapo_lite.tasks.comparison import Comparison
from hapo_lite.tasks.notation import tidy
from hapo_lite.tasks.shapes import parse as parse_shape
from hapo_lite.tasks.units import unit_of, words_change_value

MEMORY_BYTES = 1 << 30
"""Address space of one process; grading takes 70 MiB of it."""
_REFUSED = (
    *("subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "os.system", "os.exec", "os.spawn", "os.posix_spawn"),
    *("os.fork", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.putenv"),
)
"""Audit events of Python, or how they begin."""
_WORD_BEHIND = re.compile(r"(\s*)([A-Za-z]+)")
CHARACTERS_BEHIND = 40
"""How far behind a number in running text words are taken to belong to it."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may want to save a checkpoint.
    parent = os.getppid()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    logging.disable(logging.CRITICAL)
    # Both ways once, so that no deadline pays for imports.
    judge({"gold": r"\frac{1}{2}", "answer": r"\frac{x+1}{2x+2}", "text": "It is $x$."})
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
    """Limit this process's memory, and refuse what reading an answer never needs. For good: neither can be undone."""
    for limit, amount in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS knows no limit of the address space.
            resource.setrlimit(limit, (amount, amount))
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple) -> None:
    opened_to_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if opened_to_write or event.startswith(_REFUSED):
        raise PermissionError(f"a grading process does nothing like {event}")


def judge(request: dict) -> dict:
    """{outcome, answer} of one request. answer: as found in `text`; left out where the request gave it."""
    gold, answer, text = request["gold"], request.get("answer"), request.get("text")
    if answer is not None:
        if same(gold, answer):
            return {"outcome": "correct"}
        if text is None:
            return {"outcome": "wrong"}
    found = answer_in(text)
    if found is None:
        return {"outcome": "wrong" if answer is not None else "unparseable"}
    part = "shown" not in request and is_a_term(found, text)
    _, stands_there, behind = text.rpartition(found)
    behind = behind[:CHARACTERS_BEHIND] if stands_there else ""
    word = _WORD_BEHIND.match(behind)
    unit = unit_of(word[2]) if word else None
    if word and not word[1] and (unit is None or len(word[2]) == 1):
        return {"outcome": "wrong", "answer": found[:LONGEST_ANSWER]}  # 6t is not 6
    measured = rf"{found} \text{{{word[2]}}}" if unit is not None else found
    right = not part and not words_change_value(behind) and same(gold, tidy(measured))
    return {"outcome": "correct" if right else "wrong", "answer": found[:LONGEST_ANSWER]}


def answer_in(text: str) -> str | None:
    """What math-verify finds in running text."""
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
