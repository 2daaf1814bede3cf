"""The grading process: `python -m hapo_lite.tasks._grader`, driven by verify.GraderPool over its pipes.

It writes one line when ready, then answers each JSON line {gold, answer and/or text, seconds} with {outcome, answer}.
It imports math-verify and nothing heavier. It may be killed at any moment, and it ends by itself: when its standard
input closes, when its parent is gone, and at the latest `seconds` into a request, by an alarm without a handler, which
ends even a process deep in sympy.

What a model wrote is read here and nowhere else, and math-verify has Python compute arithmetic that it finds in running
text. So the process is confined: memory has a limit, and it can start no program, open no connection and write no file.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import signal
import sys
from contextlib import suppress
from functools import lru_cache

MEMORY_BYTES = 1 << 30
"""Address space of one process; grading takes 70 MiB of it."""
_REFUSED = (
    *("subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "os.system", "os.exec", "os.spawn", "os.posix_spawn"),
    *("os.fork", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.putenv"),
)
"""Audit events of Python, or how they begin."""
RELATIVE_TOLERANCE = 1e-5
"""math-verify rounds to six decimals; values that small must agree to about six digits instead."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may want to save a checkpoint.
    parent = os.getppid()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    logging.disable(logging.CRITICAL)
    judge({"gold": r"\frac{1}{2}", "answer": r"\frac{x+1}{2x+2}"})
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
    gold = parse_gold(request["gold"])
    answer, text = request.get("answer"), request.get("text")
    if answer is not None:
        if same(gold, parse_answer(answer)):
            return {"outcome": "correct"}
        if text is None:
            return {"outcome": "wrong"}
    found = parse_sentence(text)
    if not found:
        return {"outcome": "wrong" if answer is not None else "unparseable"}
    return {"outcome": "correct" if same(gold, found) else "wrong", "answer": str(found[-1])[:2000]}


def parse_answer(latex: str) -> list:
    """[expression, text], [text] where it is no mathematics, or []."""
    from math_verify import LatexExtractionConfig, parse

    # Without anchors only: math-verify must read the whole box or nothing, not some number inside it.
    whole_box = [LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)]
    return _with_named_derivatives(parse(r"\boxed{" + latex + "}", whole_box, parsing_timeout=None))


parse_gold = lru_cache(maxsize=4096)(parse_answer)


def parse_sentence(text: str) -> list:
    """Like parse_answer, from running text."""
    from math_verify import parse

    return _with_named_derivatives(parse(text, parsing_timeout=None))


def _with_named_derivatives(found: list) -> list:
    """Every dx/dt a symbol of its own: math-verify solves equations for other symbols and so loses dx/dt's factor."""
    from sympy import Basic, Derivative, Symbol

    if not found or not isinstance(found[0], Basic):
        return found
    names = {derivative: Symbol(str(derivative)) for derivative in found[0].atoms(Derivative)}
    return [found[0].xreplace(names), *found[1:]] if names else found


def same(gold: list, answer: list) -> bool:
    from math_verify import verify

    if not verify(gold, answer, timeout_seconds=None) or _set_for_interval(gold, answer):
        return False
    return not gold or not answer or _same_size(gold[0], answer[0])


def _set_for_interval(gold: list, answer: list) -> bool:
    r"""\{0, 5\} for (0, 5): math-verify, which reads a point as an interval, compares the two ends alone."""
    from sympy import Interval

    return bool(gold and answer) and isinstance(gold[0], Interval) and str(answer[-1]).lstrip().startswith(r"\{")


def _same_size(gold: object, answer: object) -> bool:
    """False where both are numbers, or collections of as many, that rounding made equal: 3e-10 and 0.0."""
    g, a = _values(gold), _values(answer)
    if g is None or a is None or len(g) != len(a):
        return True
    return all(any(_close(x * scale, y) for scale in (1, 100, 0.01)) for x, y in zip(g, a, strict=True))


def _close(x: complex, y: complex) -> bool:
    return abs(x - y) <= RELATIVE_TOLERANCE * max(abs(x), abs(y))


def _values(expression: object) -> list[complex] | None:
    """Numerical values, in order of size; None where there are variables."""
    from sympy import Basic, Equality, FiniteSet, N, Tuple

    if isinstance(expression, Equality):
        expression = expression.rhs
    parts = expression.args if isinstance(expression, (FiniteSet, Tuple)) else (expression,)
    try:
        if not all(isinstance(part, Basic) and not part.free_symbols for part in parts):
            return None
        return sorted((complex(N(part, 30)) for part in parts), key=lambda z: (z.real, z.imag))
    except Exception:
        return None


if __name__ == "__main__":
    main()
