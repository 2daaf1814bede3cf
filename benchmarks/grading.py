r"""Grade real gold answers: every one must equal itself however it is typed, and nothing that differs from it may.

    python benchmarks/grading.py DATA [--workers 2]        # a folder with math500, olympiadbench, minerva .parquet

Each gold answer stands in a \boxed{}, in a sentence, in an <answer> tag, with \dfrac for \frac, with fewer and more
spaces, and with the rows of a matrix on lines of their own; those that do not come back correct are listed. Then wrong
answers by kind: gold answers with one thing changed, and random pairs of different gold answers of one type. Those
that come back correct are listed. Two rates: that of wrong answers alone, with a parser that meets their forms for the
first time; and that of right and wrong answers in turn, of at most 40 characters, with a parser that has met them.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
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
RANDOM_PAIRS = 5_000

Change = Callable[[str], str | None]


def boxed(answer: str) -> str:
    return rf"Therefore \boxed{{{answer}}}."


def sentence(answer: str) -> str:
    return f"The answer is {answer}."


def tagged(answer: str) -> str:
    return f"<think>It could be 12, or 13.</think><answer>{answer}</answer>"


def dfrac(answer: str) -> str:
    return boxed(re.sub(r"\\frac(?![a-zA-Z])", r"\\dfrac", answer))


def fewer_spaces(answer: str) -> str:
    """Without spaces but for those that end a command or part words and digits."""
    return boxed(re.sub(r"(?<![A-Za-z\d\\]) | (?![A-Za-z\d])", "", answer))


def more_spaces(answer: str) -> str:
    return boxed(re.sub(r"(?<=[+=(])|(?<=,)(?!\d\d\d)(?!\\!)", " ", answer))


def rows_on_lines(answer: str) -> str:
    return boxed(answer.replace(r"\\", "\\\\\n"))


FORMS = (boxed, sentence, tagged, dfrac, fewer_spaces, more_spaces, rows_on_lines)


def last_digit(gold: str) -> str | None:
    return _digit(gold, list(re.finditer(r"\d", gold))[-1:])


def first_digit(gold: str) -> str | None:
    return _digit(gold, list(re.finditer(r"\d", gold))[:1])


def _digit(gold: str, places: list[re.Match]) -> str | None:
    for place in places:
        return gold[: place.start()] + str((int(place.group()) + 1) % 10) + gold[place.end() :]
    return None


def negated(gold: str) -> str | None:
    """Only where a sign in front changes the value."""
    return f"-{gold}" if re.match(r"[1-9]|\\[dt]?frac|\\sqrt", gold) else None


def swapped(gold: str) -> str | None:
    """A pair the other way round."""
    pair = re.fullmatch(r"(?:\\left)?\(\s*([^,]+),\s*([^,]+?)\s*(?:\\right)?\)", gold)
    return f"({pair[2]}, {pair[1]})" if pair else None


def one_more(gold: str) -> str | None:
    return f"{gold}+1" if len(gold) < 60 and not re.search(r"text|mbox|^\$", gold) else None


def _rows(gold: str) -> tuple[str, list[list[str]]] | None:
    matrix = re.fullmatch(r"\\begin\{(.matrix)\}(.*)\\end\{\1\}", gold, re.DOTALL)
    return (matrix[1], [[e.strip() for e in row.split("&")] for row in matrix[2].split(r"\\")]) if matrix else None


def _matrix(name: str, rows: list[list[str]]) -> str:
    return rf"\begin{{{name}}} " + r" \\ ".join("&".join(row) for row in rows) + rf" \end{{{name}}}"


def rows_swapped(gold: str) -> str | None:
    if (found := _rows(gold)) is None or len(found[1]) < 2:
        return None
    name, rows = found
    return _matrix(name, [rows[1], rows[0], *rows[2:]])


def transposed(gold: str) -> str | None:
    return _matrix(found[0], [list(row) for row in zip(*found[1], strict=True)]) if (found := _rows(gold)) else None


def _is_number(gold: str) -> bool:
    return re.fullmatch(r"\d{1,9}(\.\d+)?|\\frac\{?\d+\}?\{?\d+\}?", gold) is not None


def other_unit(gold: str) -> str | None:
    """Metres for centimetres, square for cubic, on a gold answer that has a unit."""
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


def _interval_ends(gold: str) -> re.Match | None:
    return re.fullmatch(r"(?:\\left)?([\[(])([^,]+),([^,]+?)(?:\\right)?([\])])", gold)


def other_bracket(gold: str) -> str | None:
    """The first bracket of an interval open for closed, or closed for open."""
    ends = _interval_ends(gold)
    return f"{'(' if ends[1] == '[' else '['}{ends[2]},{ends[3]}{ends[4]}" if ends else None


def set_for_point(gold: str) -> str | None:
    point = re.fullmatch(r"(?:\\left)?\(([^()]*,[^()]*?)(?:\\right)?\)", gold)
    return rf"\{{{point[1]}\}}" if point and r"\infty" not in gold else None


def other_sign(gold: str) -> str | None:
    """The first plus or minus between two terms turned round."""
    place = re.search(r"(?<=[\w})]) ?([+-]) ?(?=[\w\\(])", gold)
    return f"{gold[: place.start(1)]}{'-' if place[1] == '+' else '+'}{gold[place.end(1) :]}" if place else None


NEAR_MISSES: tuple[Change, ...] = (last_digit, first_digit, negated, swapped, one_more)
CHANGES: tuple[Change, ...] = (
    *(rows_swapped, transposed, other_unit, with_magnitude, with_bound, with_letter, other_bracket, set_for_point),
    other_sign,
)


def near_misses(golds: list[str], changes: tuple[Change, ...] = NEAR_MISSES) -> list[tuple[str, str]]:
    """(near miss, gold) pairs; what is only typed in another way is no near miss."""
    return [pair for change in changes for pair in _changed(golds, change)]


def _changed(golds: list[str], change: Change) -> list[tuple[str, str]]:
    pairs = [(change(gold), gold) for gold in golds]
    return [(wrong, gold) for wrong, gold in pairs if wrong and normal_form(wrong) != normal_form(gold)]


def random_pairs(golds: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(answer, gold) pairs of different gold answers of one shape, such as two points."""
    by_kind: dict[tuple, list[str]] = {}
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
    """The number that a gold answer is, else its normal form: 4.5 and 9/2 are no pair of different answers."""
    number = plain_number(tidy(gold))
    return number.value if number else normal_form(gold)


def listed(grades: list[Grade], pairs: list[tuple[str, str]], title: str) -> list[str]:
    """A line for each wrong answer that was taken as right."""
    return [f"{title}: {a!r} is taken for {g!r}" for (a, g), grade in zip(pairs, grades, strict=True) if grade.correct]


def grade_suite(pool: GraderPool, name: str, golds: list[str], outcomes: Counter) -> tuple[list[str], list[str]]:
    """(a row of the first table, lines about what came out wrong)."""
    row, lines = [name, str(len(golds))], []
    for form in FORMS:
        grades = pool.grade_many([(form(gold), gold) for gold in golds])
        outcomes.update(g.outcome for g in grades)
        missed = [(gold, g.outcome) for gold, g in zip(golds, grades, strict=True) if not g.correct]
        lines += [f"{name}, {form.__name__}: {gold!r} is {outcome}" for gold, outcome in missed]
        row.append(str(len(golds) - len(missed)))
    wrong = near_misses(golds)
    grades, cold = timed(pool, [(boxed(answer), gold) for answer, gold in wrong])
    outcomes.update(g.outcome for g in grades)
    lines += (taken := listed(grades, wrong, name))
    short = [(boxed(a), g) for a, g in wrong if len(g) <= SHORT]
    turns = [pair for wrong_pair in short for pair in (wrong_pair, (boxed(wrong_pair[1]), wrong_pair[1]))]
    _, rate = timed(pool, turns)
    return [*row, f"{len(wrong):,}", str(len(taken)), f"{cold:,.0f}", f"{rate:,.0f}"], lines


def timed(pool: GraderPool, pairs: list[tuple[str, str]]) -> tuple[list[Grade], float]:
    """(grades, pairs a second)."""
    started = time.perf_counter()
    grades = pool.grade_many(pairs)
    return grades, len(pairs) / (time.perf_counter() - started)


def grade_changes(pool: GraderPool, golds: list[str], outcomes: Counter) -> tuple[list[list[str]], list[str]]:
    """(rows of the second table, lines about what was taken as right)."""
    kinds = [(change.__name__, _changed(golds, change)) for change in (*NEAR_MISSES, *CHANGES)]
    kinds.append(("random pairs", random_pairs(golds, RANDOM_PAIRS)))
    rows, lines = [], []
    for name, pairs in kinds:
        grades = pool.grade_many([(boxed(answer), gold) for answer, gold in pairs])
        outcomes.update(g.outcome for g in grades)
        lines += (taken := listed(grades, pairs, name))
        rows.append([name.replace("_", " "), f"{len(pairs):,}", str(len(taken))])
    return rows, lines


def table(heads: list[str], rows: list[list[str]]) -> None:
    for line in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(line) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rows, lines, golds, outcomes = [], [], [], Counter()
    with GraderPool(args.workers, timeout_s=5.0) as pool:
        for suite in SUITES:
            found = load_prompts(DataSettings(source=str(args.data / f"{suite}.parquet")))
            of_suite = [prompt.answer for prompt in found.prompts]
            golds += of_suite
            row, more = grade_suite(pool, suite, of_suite, outcomes)
            rows.append(row)
            lines += more
        changed, more = grade_changes(pool, golds, outcomes)
    heads = ["suite", "answers", "box", "sentence", "tag", "`\\dfrac`", "fewer spaces", "more spaces", "rows on lines"]
    heads += ["near misses", "taken as right", "near misses / s, cold", "answers / s"]
    table(heads, rows)
    table(["wrong answers", "pairs", "taken as right"], changed)
    print("outcomes:", ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())))
    print(*lines, *more, sep="\n")


if __name__ == "__main__":
    main()
