"""Grade real gold answers: every one must equal itself, and no near miss may.

    python benchmarks/grading.py DATA [--workers 2]        # a folder with math500, olympiadbench, minerva .parquet

Each gold answer stands in a \\boxed{}, and in a sentence ("The answer is X."); those that do not come back correct are
listed. Then near misses, gold answers with one thing changed; those that come back correct are listed. Two rates: that
of the near misses alone, with a parser that meets their forms for the first time; and that of right answers and near
misses in turn, of at most 40 characters, with a parser that has met them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.recipe import DataSettings  # noqa: E402
from hapo_lite.tasks.data import load_prompts  # noqa: E402
from hapo_lite.tasks.verify import GraderPool, normal_form  # noqa: E402

SUITES = ("math500", "olympiadbench", "minerva")
SHORT = 40


def boxed(answer: str) -> str:
    return rf"Therefore \boxed{{{answer}}}."


def sentence(answer: str) -> str:
    return f"The answer is {answer}."


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


NEAR_MISSES: tuple[Callable[[str], str | None], ...] = (last_digit, first_digit, negated, swapped, one_more)


def near_misses(golds: list[str]) -> list[tuple[str, str]]:
    """(near miss, gold) pairs; what is only typed in another way is no near miss."""
    pairs = [(change(gold), gold) for gold in golds for change in NEAR_MISSES]
    return [(wrong, gold) for wrong, gold in pairs if wrong and normal_form(wrong) != normal_form(gold)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rows, listed = [], []
    with GraderPool(args.workers, timeout_s=5.0) as pool:
        for suite in SUITES:
            found = load_prompts(DataSettings(source=str(args.data / f"{suite}.parquet")))
            golds = [prompt.answer for prompt in found.prompts]
            row = [suite, str(len(golds))]
            for form in (boxed, sentence):
                grades = pool.grade_many([(form(gold), gold) for gold in golds])
                missed = [(gold, g.outcome) for gold, g in zip(golds, grades, strict=True) if not g.correct]
                listed += [f"{suite}, {form.__name__}: {gold!r} is {outcome}" for gold, outcome in missed]
                row.append(str(len(golds) - len(missed)))
            wrong = near_misses(golds)
            started = time.perf_counter()
            grades = pool.grade_many([(boxed(answer), gold) for answer, gold in wrong])
            cold = len(wrong) / (time.perf_counter() - started)
            taken = [pair for pair, g in zip(wrong, grades, strict=True) if g.correct]
            listed += [f"{suite}: {answer!r} is taken for {gold!r}" for answer, gold in taken]
            short = [(boxed(a), g) for a, g in wrong if len(g) <= SHORT]
            turns = [pair for wrong_pair in short for pair in (wrong_pair, (boxed(wrong_pair[1]), wrong_pair[1]))]
            started = time.perf_counter()
            pool.grade_many(turns)
            rate = len(turns) / (time.perf_counter() - started)
            rows.append([*row, str(len(wrong)), str(len(taken)), f"{cold:,.0f}", f"{rate:,.0f}"])
    heads = ["suite", "answers", "right in a box", "in a sentence", "near misses", "taken as right"]
    heads += ["near misses / s, cold", "answers / s"]
    for line in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(line) + " |")
    print(*listed, sep="\n")


if __name__ == "__main__":
    main()
