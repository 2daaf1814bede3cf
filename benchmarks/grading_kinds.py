"""Grade the kinds of answers in grading_kinds.yaml, which a grader gets wrong.

python benchmarks/grading_kinds.py          # wrong verdicts by kind, and the pairs that they are about
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from hapo_lite.tasks.verify import GraderPool

KINDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
WRONG: dict[str, list[list[str]]] = KINDS["wrong"]
RIGHT: dict[str, list[list[str]]] = KINDS["right"]
"""By kind, pairs of the answer in the box and the gold answer."""


def main() -> None:
    print("| kind | wrong answers | taken as right | right answers | refused |\n|---|---|---|---|---|")
    lines = []
    with GraderPool(workers=2, timeout_s=20) as pool:
        for kind in dict.fromkeys([*WRONG, *RIGHT]):
            cells = []
            for pairs, right in ((WRONG.get(kind, []), False), (RIGHT.get(kind, []), True)):
                grades = pool.grade_many([(rf"Therefore \boxed{{{answer}}}.", gold) for answer, gold in pairs])
                missed = [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct != right]
                cells += [str(len(pairs)), str(len(missed))] if pairs else ["", ""]
                lines += [f"{kind}: {a} / {g} is {'wrong' if right else 'right'}" for a, g in missed]
            print(f"| {kind} | " + " | ".join(cells) + " |")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
