r"""The kinds of answers that the grader gets wrong: wrong answers taken as right, and right answers refused.

    python benchmarks/grading_kinds.py          # wrong verdicts by kind, and the pairs that they are about

The pairs are in grading_pairs.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.grading_pairs import RIGHT, WRONG
from hapo_lite.tasks.verify import GraderPool


def missed(pool: GraderPool, pairs: list[tuple[str, str]], right: bool) -> list[tuple[str, str]]:
    """The pairs that are not graded as `right` says."""
    grades = pool.grade_many([(rf"Therefore \boxed{{{answer}}}.", gold) for answer, gold in pairs])
    return [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct != right]


def main() -> None:
    print("| kind | wrong answers | taken as right | right answers | refused |\n|---|---|---|---|---|")
    lines = []
    with GraderPool(workers=2, timeout_s=20) as pool:
        for kind in dict.fromkeys([*WRONG, *RIGHT]):
            cells = []
            for pairs, right in ((WRONG.get(kind, []), False), (RIGHT.get(kind, []), True)):
                found = missed(pool, pairs, right)
                cells += [str(len(pairs)), str(len(found))] if pairs else ["", ""]
                lines += [f"{kind}: {a} / {g} is {'wrong' if right else 'right'}" for a, g in found]
            print(f"| {kind} | " + " | ".join(cells) + " |")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
