r"""Grade real gold answers: every one must equal itself however it is typed, and nothing that differs from it may.

    python benchmarks/grading.py DATA [--workers 2]        # a folder with math500, olympiadbench, minerva .parquet

Each gold answer stands in a \boxed{}, in a sentence, in an <answer> tag, with \dfrac for \frac, with fewer and more
spaces, and with the rows of a matrix on lines of their own; those that are not graded correct are listed. Wrong answers
are gold answers with one thing changed, and random pairs of different gold answers of one type; those that are graded
correct are listed. There are two rates: "cold" for wrong answers alone, whose forms the parser meets for the first
time, and one for right and wrong answers in turn, of at most 40 characters, that the parser has met before.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.recipe import DataSettings  # noqa: E402
from hapo_lite.tasks.data import load_prompts  # noqa: E402
from hapo_lite.tasks.notation import plain_number, tidy  # noqa: E402
from hapo_lite.tasks.shapes import parse  # noqa: E402
from hapo_lite.tasks.verify import Grade, GraderPool, normal_form  # noqa: E402

SUITES = ("math500", "olympiadbench", "minerva")
SHORT = 40
"""Most characters of the gold answers behind the second rate."""
RANDOM_PAIRS = 5_000

Change = Callable[[str], str | None]
"""A gold answer -> another answer that looks like it; None where the change does not apply."""


def boxed(answer: str) -> str:
    return rf"Therefore \boxed{{{answer}}}."


def sentence(answer: str) -> str:
    return f"The answer is {answer}."


def tagged(answer: str) -> str:
    return f"<think>It could be 12, or 13.</think><answer>{answer}</answer>"


def dfrac(answer: str) -> str:
    return boxed(re.sub(r"\\frac(?![a-zA-Z])", r"\\dfrac", answer))


def fewer_spaces(answer: str) -> str:
    """The answer without spaces, except those that end a command or stand between words and digits."""
    return boxed(re.sub(r"(?<![A-Za-z\d\\]) | (?![A-Za-z\d])", "", answer))


def more_spaces(answer: str) -> str:
    return boxed(re.sub(r"(?<=[+=(])|(?<=,)(?!\d\d\d)(?!\\!)", " ", answer))


def rows_on_lines(answer: str) -> str:
    return boxed(answer.replace(r"\\", "\\\\\n"))


FORMS = (boxed, sentence, tagged, dfrac, fewer_spaces, more_spaces, rows_on_lines)


def last_digit(gold: str) -> str | None:
    places = list(re.finditer(r"\d", gold))
    return _one_up(gold, places[-1]) if places else None


def first_digit(gold: str) -> str | None:
    place = re.search(r"\d", gold)
    return _one_up(gold, place) if place else None


def _one_up(gold: str, digit: re.Match[str]) -> str:
    return gold[: digit.start()] + str((int(digit.group()) + 1) % 10) + gold[digit.end() :]


def negated(gold: str) -> str | None:
    """The answer with a minus sign in front, where that changes the value."""
    return f"-{gold}" if re.match(r"[1-9]|\\[dt]?frac|\\sqrt", gold) else None


def swapped(gold: str) -> str | None:
    """A pair with its members exchanged."""
    pair = re.fullmatch(r"(?:\\left)?\(\s*([^,]+),\s*([^,]+?)\s*(?:\\right)?\)", gold)
    return f"({pair[2]}, {pair[1]})" if pair else None


def one_more(gold: str) -> str | None:
    return f"{gold}+1" if len(gold) < 60 and not re.search(r"text|mbox|^\$", gold) else None


def _rows(gold: str) -> tuple[str, list[list[str]]] | None:
    """(name of the environment, entries by row) of a matrix."""
    matrix = re.fullmatch(r"\\begin\{(.matrix)\}(.*)\\end\{\1\}", gold, re.DOTALL)
    if matrix is None:
        return None
    return matrix[1], [[entry.strip() for entry in row.split("&")] for row in matrix[2].split(r"\\")]


def _matrix(name: str, rows: list[list[str]]) -> str:
    return rf"\begin{{{name}}} " + r" \\ ".join("&".join(row) for row in rows) + rf" \end{{{name}}}"


def rows_swapped(gold: str) -> str | None:
    found = _rows(gold)
    if found is None or len(found[1]) < 2:
        return None
    name, rows = found
    return _matrix(name, [rows[1], rows[0], *rows[2:]])


def transposed(gold: str) -> str | None:
    found = _rows(gold)
    if found is None:
        return None
    name, rows = found
    return _matrix(name, [list(row) for row in zip(*rows, strict=True)])


def _is_number(gold: str) -> bool:
    return re.fullmatch(r"\d{1,9}(\.\d+)?|\\frac\{?\d+\}?\{?\d+\}?", gold) is not None


def other_unit(gold: str) -> str | None:
    """A gold answer that has a unit with another one, such as km for cm or a cube for a square."""
    changed = re.sub(r"\^2$", "^3", gold) if "text" in gold or "mbox" in gold else gold
    for a, b in (("cents", "dollars"), ("inches", "feet"), ("degrees", "radians"), ("cm", "km")):
        changed = gold.replace(a, b) if changed == gold else changed
    return changed if changed != gold else None


def with_magnitude(gold: str) -> str | None:
    return rf"{gold}\text{{ million}}" if _is_number(gold) and gold != "0" else None


def with_bound(gold: str) -> str | None:
    return rf"{gold}\text{{ or more}}" if _is_number(gold) else None


def with_letter(gold: str) -> str | None:
    return f"{gold}t" if _is_number(gold) and gold != "0" else None


def _interval_ends(gold: str) -> re.Match[str] | None:
    return re.fullmatch(r"(?:\\left)?([\[(])([^,]+),([^,]+?)(?:\\right)?([\])])", gold)


def other_bracket(gold: str) -> str | None:
    """An interval with its left end open instead of closed, or closed instead of open."""
    ends = _interval_ends(gold)
    return f"{'(' if ends[1] == '[' else '['}{ends[2]},{ends[3]}{ends[4]}" if ends else None


def set_for_point(gold: str) -> str | None:
    point = re.fullmatch(r"(?:\\left)?\(([^()]*,[^()]*?)(?:\\right)?\)", gold)
    return rf"\{{{point[1]}\}}" if point and r"\infty" not in gold else None


def other_sign(gold: str) -> str | None:
    """The answer with its first plus between two terms made a minus, or its first minus a plus."""
    place = re.search(r"(?<=[\w})]) ?([+-]) ?(?=[\w\\(])", gold)
    return f"{gold[: place.start(1)]}{'-' if place[1] == '+' else '+'}{gold[place.end(1) :]}" if place else None


NEAR_MISSES: tuple[Change, ...] = (last_digit, first_digit, negated, swapped, one_more)
CHANGES: tuple[Change, ...] = (
    rows_swapped,
    transposed,
    other_unit,
    with_magnitude,
    with_bound,
    with_letter,
    other_bracket,
    set_for_point,
    other_sign,
)


@dataclass
class Findings:
    """The results so far: a row for each suite and for each kind of wrong answer, and a line for each wrong verdict."""

    suites: list[list[str]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add_wrong(self, grades: list[Grade], pairs: list[tuple[str, str]], title: str) -> int:
        """List the wrong answers that were graded correct, and return their number."""
        self.outcomes.update(grade.outcome for grade in grades)
        taken = [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct]
        self.lines += [f"{title}: {answer!r} is taken for {gold!r}" for answer, gold in taken]
        return len(taken)


def near_misses(golds: list[str], changes: tuple[Change, ...] = NEAR_MISSES) -> list[tuple[str, str]]:
    """(near miss, gold) pairs. The gold answer typed in another way is not a near miss."""
    return [pair for change in changes for pair in _changed(golds, change)]


def _changed(golds: list[str], change: Change) -> list[tuple[str, str]]:
    pairs = [(change(gold), gold) for gold in golds]
    return [(wrong, gold) for wrong, gold in pairs if wrong and normal_form(wrong) != normal_form(gold)]


def random_pairs(golds: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(answer, gold) pairs of different gold answers of one shape, such as two points."""
    by_kind: dict[tuple[str, int], list[str]] = {}
    for gold in dict.fromkeys(golds):
        shape = parse(tidy(gold))
        by_kind.setdefault((shape.kind, len(shape.parts)), []).append(gold)
    pools = [pool for pool in by_kind.values() if len({normal_form(gold) for gold in pool}) > 1]
    chosen = random.Random(seed)
    pairs: dict[tuple[str, str], None] = {}
    for _ in range(20 * count):
        a, g = chosen.sample(chosen.choices(pools, [len(pool) for pool in pools])[0], 2)
        if _value(a) != _value(g):
            pairs[a, g] = None
        if len(pairs) == count:
            break
    return list(pairs)


def _value(gold: str) -> object:
    """The value of a gold answer that is a number, else its normal form: 4.5 and 9/2 do not differ."""
    number = plain_number(tidy(gold))
    return number.value if number else normal_form(gold)


def grade_suite(pool: GraderPool, name: str, golds: list[str], findings: Findings) -> None:
    """Grade the gold answers of a suite in every form, and its near misses; add a row to the first table."""
    row = [name, str(len(golds))]
    for form in FORMS:
        grades = pool.grade_many([(form(gold), gold) for gold in golds])
        findings.outcomes.update(grade.outcome for grade in grades)
        missed = [(gold, grade.outcome) for gold, grade in zip(golds, grades, strict=True) if not grade.correct]
        findings.lines += [f"{name}, {form.__name__}: {gold!r} is {outcome}" for gold, outcome in missed]
        row.append(str(len(golds) - len(missed)))
    wrong = near_misses(golds)
    grades, cold = timed(pool, [(boxed(answer), gold) for answer, gold in wrong])
    taken = findings.add_wrong(grades, wrong, name)
    turns = []
    for answer, gold in wrong:
        if len(gold) <= SHORT:
            turns += [(boxed(answer), gold), (boxed(gold), gold)]
    _, rate = timed(pool, turns)
    findings.suites.append([*row, f"{len(wrong):,}", str(taken), f"{cold:,.0f}", f"{rate:,.0f}"])


def timed(pool: GraderPool, pairs: list[tuple[str, str]]) -> tuple[list[Grade], float]:
    """(grades, pairs a second)."""
    started = time.perf_counter()
    grades = pool.grade_many(pairs)
    return grades, len(pairs) / (time.perf_counter() - started)


def grade_changes(pool: GraderPool, golds: list[str], findings: Findings) -> None:
    """Grade wrong answers of every kind; add a row for each to the second table."""
    kinds = [(change.__name__, _changed(golds, change)) for change in (*NEAR_MISSES, *CHANGES)]
    kinds.append(("random pairs", random_pairs(golds, RANDOM_PAIRS)))
    for name, pairs in kinds:
        grades = pool.grade_many([(boxed(answer), gold) for answer, gold in pairs])
        taken = findings.add_wrong(grades, pairs, name)
        findings.kinds.append([name.replace("_", " "), f"{len(pairs):,}", str(taken)])


def table(heads: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for line in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(line) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    findings = Findings()
    golds: list[str] = []
    with GraderPool(args.workers, timeout_s=5.0) as pool:
        for suite in SUITES:
            found = load_prompts(DataSettings(source=str(args.data / f"{suite}.parquet")))
            of_suite = [prompt.answer for prompt in found.prompts]
            golds += of_suite
            grade_suite(pool, suite, of_suite, findings)
        grade_changes(pool, golds, findings)
    heads = ["suite", "answers", "box", "sentence", "tag", "`\\dfrac`", "fewer spaces", "more spaces", "rows on lines"]
    heads += ["near misses", "taken as right", "near misses / s, cold", "answers / s"]
    table(heads, findings.suites)
    table(["wrong answers", "pairs", "taken as right"], findings.kinds)
    print("outcomes:", ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(findings.outcomes.items())))
    print(*findings.lines, sep="\n")


if __name__ == "__main__":
    main()
