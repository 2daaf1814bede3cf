r"""Grading a completion against a gold answer: right, wrong, or why that could not be told.

Three steps. Find the answer in the text: the last complete `\boxed{...}`, else what follows the last "answer is",
"Answer:" or `####`. Settle the plain cases here: equal text, numbers compared exactly, words. Hand the rest to
math-verify in a process of its own: sympy can think for minutes about a short expression, and only a process can be
stopped for certain. Numbers may differ in the way they are written, never in value beyond math-verify's six decimals.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from hapo_lite.errors import UserError

Outcome = Literal["correct", "wrong", "unparseable", "timeout", "error"]

LONGEST_ANSWER = 2_000
"""Characters of an answer, and of the end of a text without one, that are read at all."""
_SEARCHED = 100_000
_STARTING_S = 120.0
_BACKSTOP_S = 5.0


@dataclass(frozen=True)
class Grade:
    """One verdict. answer: the text that was graded, None where none was found.

    outcome: "correct"; "wrong"; "unparseable": the completion states no answer; "timeout": comparing took longer than
    the deadline; "error": the grading process died, for instance out of memory.
    """

    correct: bool
    answer: str | None
    outcome: Outcome


def grade(completion_text: str, gold: str, timeout_s: float = 5.0) -> Grade:
    """Grade one completion; from any thread. timeout_s: deadline of the comparison, seconds."""
    return _shared_pool().grade_many([(completion_text, gold)], timeout_s)[0]


# ------------------------------------------------------------------------------------------------ finding the answer

_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_STATEMENT = re.compile(r"\banswer\b[*_\s]{0,8}(?:is\b|[:=])[*_:\s]{0,8}|####", re.IGNORECASE)
_FORMULA = r"\$(?:\\.|[^$\\])+\$"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s*(?:,?\s*and\b|,?\s*or\b|,|;)\s*{_FORMULA})*", re.DOTALL)
_SENTENCE_END = re.compile(r"\.(?=\s|$)")


def boxed_answer(text: str) -> str | None:
    r"""Content of the last complete, non-empty `\boxed{...}` or `\fbox{...}`; None where there is none."""
    return _scan_boxes(text)[0]


def _scan_boxes(text: str) -> tuple[str | None, bool]:
    """(content of the last complete box, whether a box is left open at the end), in one pass over the text."""
    text = text[-_SEARCHED:]
    open_braces: list[int | None] = []
    best_start, best = -1, None
    for token in _BOX_TOKENS.finditer(text):
        piece = token.group()
        if piece == "{":
            open_braces.append(None)
        elif piece == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start > best_start and (content := text[start : token.start()].strip()):
                best_start, best = start, content
        elif piece[-1] == "{" and len(piece) > 2:
            open_braces.append(token.end())
    return best, any(start is not None for start in open_braces)


def _stated_answer(text: str) -> tuple[str | None, str | None]:
    """What follows the last "answer is", "Answer:" or `####`: (its formula if it begins with one, else all; all).

    All is what stands there up to the end of the sentence or line.
    """
    statements = deque(_STATEMENT.finditer(text, max(0, len(text) - _SEARCHED)), maxlen=1)
    if not statements:
        return None, None
    statement = statements.pop()
    rest = text[statement.end() : statement.end() + LONGEST_ANSWER].strip().lstrip("*_ ")
    line = rest.split("\n", 1)[0]
    if end := _SENTENCE_END.search(line):
        line = line[: end.start()]
    line = line.strip().rstrip("*_ ") or None
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$")):
        if rest.startswith(opening) and (end := rest.find(closing, 2)) > 0:
            return rest[2:end].strip() or None, line
    if formula := _FORMULAS.match(rest):
        return formula.group(), line
    return line, line


# ------------------------------------------------------------------------------------------------- the plain cases

_THOUSANDS = re.compile(r"(?<=\d)(?:(,)\s*\\!|\\[,!])\s*(?=\d{3}(?!\d))", re.ASCII)
_SPACES = re.compile(r"(?:\\[,;: ]|~|\s)+")
_SPACE_BY_SYMBOL = re.compile(r"(?<=[^\w.,]) | (?=[^\w.,])")
_FRACTION_NAME = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_SIZING = re.compile(r"\\(?:left|right)(?![a-zA-Z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_DOLLAR = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(
    rf"""(?P<sign>[+-]?)(?:\\\$)?(?:
        (?P<number>{_DECIMAL})(?:
            [eE](?P<e>[+-]?\d{{1,3}})
            |(?:\\times[ ]?|\\cdot[ ]?|×|\*)10\^(?:\{{(?P<p>[+-]?\d{{1,3}})\}}|(?P<q>\d))
        )?
        |10\^(?:\{{(?P<r>[+-]?\d{{1,3}})\}}|(?P<s>\d))
        |\\frac(?:\{{(?P<n1>[+-]?{_DECIMAL})\}}\{{(?P<d1>[+-]?{_DECIMAL})\}}|(?P<n2>\d)(?P<d2>\d))
        |(?P<n3>{_DECIMAL})/(?P<d3>[+-]?{_DECIMAL})
    )""",
    re.VERBOSE | re.ASCII,
)
_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w{1,8}\}?)?=([^=]+)")
_UNIT_POWER = re.compile(
    r"\\(?:text|textrm|mbox|mathrm)\s*\{[^{}]*[A-Za-z]\s*\}\s*\^\s*\{?\s*([+-]?\d+)\s*\}?$", re.ASCII
)
_BASE = re.compile(r"\d_\{?(\d+)\}?$", re.ASCII)
_LEFT_TO_DO = re.compile(
    r"[\d)}\]]\s*(?:[-+*×÷]|\\times|\\cdot|\\div)\s*(?!10\s*\^)(?:[\d(.{]|\\(?:frac|sqrt|left|pi))"
    r"|\\(?:sum|prod|int|lim|binom|gcd|lcm|max|min)(?![a-zA-Z])|[\d)}]\s*!"
)
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '\-])*")
_SHORT_WORDS = {"yes", "no", "odd", "all"}
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")


def _tidy(text: str) -> str:
    """The same answer with typographic variants folded: digits of any script, full-width forms, minus signs, spacing.

    Superscript digits stay as they are: folding them would make 4² read 42.
    """
    if not text.isascii():
        text = "".join(_folded(c) for c in text)
    text = _THOUSANDS.sub(r"\1", text.replace("{,}", ",")).replace("\\!", "")
    text = _SPACES.sub(" ", text)
    return _DOLLAR.sub("", text).strip().rstrip(".,; ")


def _folded(c: str) -> str:
    if (digit := unicodedata.decimal(c, None)) is not None:
        return str(digit)
    if "！" <= c <= "～":
        return chr(ord(c) - 0xFEE0)
    return "-" if c in "−﹣" else c


def _canonical(tidy: str) -> str:
    text = _SIZING.sub("", _FRACTION_NAME.sub(r"\\frac", tidy))
    text = _TEXT.sub(lambda m: m.group(1).strip(), text) if "{" in text else text
    return _SPACE_BY_SYMBOL.sub("", text)


def _plain(canonical: str) -> tuple[Fraction, bool] | None:
    """(value, whether it is written as a decimal) of an integer, decimal, a/b, or a x 10^b; None for anything else."""
    if len(canonical) > 1_000:
        return None
    match = _PLAIN.fullmatch(canonical)
    if match is None:
        return None
    g = {name: value.replace(",", "") for name, value in match.groupdict().items() if value is not None}
    power = next((int(g[name]) for name in "epqrs" if name in g), 0)
    value = _fraction(g.get("number", "1")) * Fraction(10) ** power
    for n in "123":
        if f"n{n}" in g:
            denominator = _fraction(g[f"d{n}"])
            if not denominator:
                return None
            value = _fraction(g[f"n{n}"]) / denominator
    return -value if g["sign"] == "-" else value, "." in canonical or "e" in g


def _fraction(digits: str) -> Fraction:
    whole, _, decimals = digits.partition(".")
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals)) if decimals else Fraction(int(whole))


def normal_form(answer: str) -> str:
    """The same answer in one of the ways it may be typed: what counts as one vote in maj@k."""
    return _canonical(_tidy(answer)).casefold()


def _text_gold(gold: str, canonical: str) -> str | None:
    """The gold answer's letters where it is words or a choice such as (A), else None."""
    wrapped = _TEXT.fullmatch(gold) is not None
    if choice := _CHOICE.fullmatch(canonical):
        return choice.group(1)
    words = _WORDS.fullmatch(canonical)
    if words and (wrapped or canonical.casefold() in _SHORT_WORDS or any(len(w) > 3 for w in canonical.split())):
        return canonical
    return None


def _settled(answer: str, gold: str) -> bool | None:
    """Whether two tidy texts agree, where that is plain to see; None where mathematics has to decide."""
    a, g = _canonical(answer), _canonical(gold)
    if a == g:
        return True
    number = _plain(g)
    if number is not None:
        assigned = _ASSIGNED.fullmatch(a)
        stated = _plain(assigned.group(1) if assigned else a)
        if stated is not None:
            if stated[0] == number[0]:
                return True
            # 0.333333 for 1/3 is left to math-verify's rounding.
            return False if stated[1] == number[1] or _terminates(stated[0]) == _terminates(number[0]) else None
        # An arithmetic task copied into the box is not an answer to it.
        return False if _LEFT_TO_DO.search(answer.rsplit("=", 1)[-1]) else None
    if (text := _text_gold(gold, g)) is not None:
        # math-verify would read letters as a product of variables, in which "seat" equals "east".
        choice = _CHOICE.fullmatch(a)
        if len(text) == 1:
            same_case = g == text and _TEXT.fullmatch(gold) is None
            said = choice.group(1) if choice else None
            return said is not None and (said == text if same_case else said.casefold() == text.casefold())
        return a.casefold() == text.casefold()
    # math-verify drops units, and would take cm^3 for cm^2.
    powers = _UNIT_POWER.search(answer), _UNIT_POWER.search(gold)
    if all(powers) and int(powers[0].group(1)) != int(powers[1].group(1)):
        return False
    bases = _BASE.search(a), _BASE.search(g)
    if all(bases) and bases[0].group(1) != bases[1].group(1):
        return False
    return None


def _terminates(value: Fraction) -> bool:
    d = value.denominator
    for p in (2, 5):
        while d % p == 0:
            d //= p
    return d == 1


def _is_a_term(number: str, text: str) -> bool:
    """Whether the last `number` in a text is but a term of something longer, such as 2 in "Take 2*14"."""
    if _plain(number) is None:
        return False
    last = deque(re.finditer(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text), maxlen=1)
    if not last:
        return False
    operator = r"\s*(?:[-+*/^×÷]|\\times|\\cdot|\\div)\s*"
    return bool(
        re.match(rf"{operator}[\d({{\\]", text[last[0].end() :])
        or re.search(rf"[\d)}}]{operator}$", text[: last[0].start()])
    )


def _read(text: str, gold: str) -> Grade | dict[str, str]:
    """A grade where it is plain, else the request for a grading process."""
    answer, left_open = _scan_boxes(text)
    stated, whole = False, None
    if answer is None and left_open:
        return Grade(False, None, "unparseable")
    if answer is None:
        (answer, whole), stated = _stated_answer(text), True
    gold = _tidy(boxed_answer(gold) or gold)
    # A gold answer may be a formula with words after it: "$f(x)=ax$, where $a$ is an integer".
    if whole and gold and _canonical(_tidy(whole)) == _canonical(gold):
        return Grade(True, whole, "correct")
    if answer is None:
        if not gold or len(gold) > LONGEST_ANSWER:
            return Grade(False, None, "unparseable")
        return {"text": text[-LONGEST_ANSWER:], "gold": gold}
    if len(answer) > LONGEST_ANSWER:
        return Grade(False, None, "unparseable")
    tidy = _tidy(answer)
    settled = _settled(tidy, gold) if tidy and 0 < len(gold) <= LONGEST_ANSWER else False
    in_prose = stated and _PROSE.search(tidy) is not None
    if settled or (settled is False and not in_prose):
        return Grade(settled, answer, "correct" if settled else "wrong")
    request = {"shown": answer, "gold": gold}
    if settled is None:
        request["answer"] = tidy
    if in_prose:
        request["text"] = f"The answer is {tidy}"
    return request


# --------------------------------------------------------------------------------------------- the grading processes


class _Worker:
    """One grading process. It writes a line when it is ready, then answers each line with a line."""

    def __init__(self) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # A fixed hash seed, since sympy's order of terms, and with it now and then its verdict, depends on it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hapo_lite.tasks._grader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        self.ready = False
        self._received = b""

    def send(self, request: dict[str, str], timeout_s: float) -> None:
        """Raises OSError where the process is gone."""
        if self.process.poll() is not None:
            raise BrokenPipeError
        self.process.stdin.write(json.dumps(request | {"seconds": timeout_s + _BACKSTOP_S}).encode() + b"\n")

    def receive(self) -> dict | None:
        """The next message, None while it is incomplete. Raises EOFError where the process is gone."""
        chunk = os.read(self.process.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        self._received += chunk
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return json.loads(line)

    def complaint(self) -> str:
        self.process.kill()
        lines = self.process.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self.process.wait()}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError):
                pipe.close()


class GraderPool:
    """Grading processes, started when first needed. Close it, or use it as a context manager.

    workers: most processes at once. timeout_s: deadline of one comparison, seconds; a process past it is killed and
    replaced. Usable from any thread; calls take turns.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0) -> None:
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"workers and timeout_s must be positive, not {workers} and {timeout_s}")
        self._size, self._timeout_s = workers, timeout_s
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def grade_many(
        self,
        pairs: Sequence[tuple[str, str]],
        timeout_s: float | None = None,
        graded: Callable[[int], None] = lambda count: None,
    ) -> list[Grade]:
        """Grades of (completion text, gold answer) pairs, in their order. Never raises because of what a text says.

        graded: told how many more of them have their grade. Raises UserError where the grading processes cannot be
        started, RuntimeError after `close`.
        """
        read = [_read(text, gold) for text, gold in pairs]
        # Completions of one prompt often give the same answer: each distinct comparison is made once.
        open_requests = {json.dumps(r): r for r in read if isinstance(r, dict)}
        pairs_of = Counter(json.dumps(r) for r in read if isinstance(r, dict))
        graded(len(read) - pairs_of.total())
        if open_requests:
            with self._lock:
                if self._closed:
                    raise RuntimeError("this GraderPool is closed")
                counts = [pairs_of[key] for key in open_requests]
                answered = self._ask_all(
                    list(open_requests.values()), timeout_s or self._timeout_s, lambda i: graded(counts[i])
                )
            verdicts = dict(zip(open_requests, answered, strict=True))
        return [r if isinstance(r, Grade) else verdicts[json.dumps(r)] for r in read]

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_all(self, requests: list[dict[str, str]], timeout_s: float, graded: Callable[[int], None]) -> list[Grade]:
        grades: list[Grade] = [None] * len(requests)  # type: ignore[list-item]
        todo = deque(range(len(requests)))
        busy: dict[_Worker, tuple[int, float]] = {}
        retried: set[int] = set()
        with selectors.DefaultSelector() as selector:

            def finish(worker: _Worker, outcome: Outcome, answer: str | None = None, alive: bool = False) -> None:
                index, _ = busy.pop(worker)
                selector.unregister(worker.process.stdout)
                request = requests[index]
                # What was found in running text has not been held against the plain cases yet.
                if outcome == "correct" and answer and _settled(_tidy(answer), request["gold"]) is False:
                    outcome = "wrong"
                if outcome == "correct" and answer and "shown" not in request and _is_a_term(answer, request["text"]):
                    outcome = "wrong"
                answer = request.get("shown", answer)
                if grades[index] is None:
                    graded(index)
                grades[index] = Grade(outcome == "correct", answer, outcome)
                if alive:
                    self._idle.append(worker)
                else:
                    worker.close()

            try:
                while todo or busy:
                    while todo and len(busy) < self._size:
                        worker = self._send_to_any(requests[todo[0]], timeout_s)
                        wait_s = timeout_s if worker.ready else _STARTING_S
                        busy[worker] = (todo.popleft(), time.monotonic() + wait_s)
                        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                    next_deadline = min(deadline for _, deadline in busy.values())
                    for key, _ in selector.select(max(0.0, next_deadline - time.monotonic())):
                        worker = key.data
                        try:
                            message = worker.receive()
                        except (EOFError, OSError, ValueError):
                            if not worker.ready:
                                raise UserError(_not_started(worker.complaint())) from None
                            index = busy[worker][0]
                            finish(worker, "error")
                            # It may have been dead before it was asked: once more before the request is blamed.
                            if index not in retried:
                                retried.add(index)
                                todo.append(index)
                            continue
                        if message is not None and not worker.ready:
                            # The deadline is for comparing: it starts when the process has done its imports.
                            worker.ready = True
                            busy[worker] = (busy[worker][0], time.monotonic() + timeout_s)
                        elif message is not None:
                            finish(worker, message["outcome"], message.get("answer"), alive=True)
                    now = time.monotonic()
                    for worker in [w for w, (_, deadline) in busy.items() if deadline <= now]:
                        if not worker.ready:
                            raise UserError(_not_started(f"it was not ready after {_STARTING_S:.0f} seconds"))
                        finish(worker, "timeout")
            finally:
                for worker in busy:
                    worker.close()
        return grades

    def _send_to_any(self, request: dict[str, str], timeout_s: float) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.send(request, timeout_s)
                return worker
            except OSError:
                worker.close()
        worker = _Worker()
        with suppress(OSError):
            worker.send(request, timeout_s)
        return worker


def _not_started(reason: str) -> str:
    return f"a grading process did not start ({reason}): check that math-verify is installed beside {sys.executable}"


_shared: GraderPool | None = None
_shared_lock = threading.Lock()


def _shared_pool() -> GraderPool:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = GraderPool(workers=1)
            atexit.register(_shared.close)
        return _shared
