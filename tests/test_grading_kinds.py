"""Kinds of answers that a grader gets wrong (benchmarks/grading_kinds.py), and the answer that counts in a text."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import grading
from benchmarks.grading_kinds import RIGHT, WRONG
from hapo_lite.tasks.answers import find
from hapo_lite.tasks.grader import _Worker
from hapo_lite.tasks.verify import GraderPool, marked_answer
from tests.graders import box

TEXTS = [
    pytest.param(*row, id=f"{kind}-{number}")
    for kind, rows in yaml.safe_load(Path(__file__).with_name("answers_in_texts.yaml").read_text("utf-8")).items()
    for number, row in enumerate(rows)
]


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=20) as pool:
        yield pool


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_answers_earn_nothing(pool, kind):
    grades = pool.grade_many([(box(answer), gold) for answer, gold in WRONG[kind]])
    assert [(p, g.outcome) for p, g in zip(WRONG[kind], grades, strict=True) if g.outcome != "wrong"] == []


@pytest.mark.parametrize("kind", RIGHT)
def test_right_answers_are_taken(pool, kind):
    grades = pool.grade_many([(box(answer), gold) for answer, gold in RIGHT[kind]])
    assert [(p, g.outcome) for p, g in zip(RIGHT[kind], grades, strict=True) if not g.correct] == []


@pytest.mark.parametrize(("completion", "gold", "outcome"), TEXTS)
def test_one_answer_of_a_text_counts(pool, completion, gold, outcome):
    assert pool.grade_many([(completion, gold)])[0].outcome == outcome


def test_the_answer_that_counts_is_named():
    assert marked_answer(r"<think>\boxed{1}</think> \boxed{3} and \boxed{5}") == "3; 5"
    assert marked_answer("The answer is 3") is None
    assert find("So the answer is $3$, I think.").answer == "$3$"
    assert find(r"\boxed{3").open and find("<answer>3").open


@pytest.mark.parametrize(
    "text", ["<think>", "</think>", "<answer>", "</answer>", r"\boxed{1} or ", "<think>1</think>2"]
)
def test_a_megabyte_is_searched_in_no_time(text):
    megabyte = text * (1_000_000 // len(text))
    find(megabyte[:1000])
    took = []
    for _ in range(3):
        started = time.thread_time()
        find(megabyte)
        took.append(time.thread_time() - started)
    assert min(took) < 0.15  # 0.05 on a machine that does nothing else


def test_an_answer_that_comes_with_the_first_line_is_heard():
    """A process may have answered before its first line is read; nothing more would come to wake the reader."""
    end, start = os.pipe()
    os.write(start, b'{}\n{"outcome": "wrong"}\n{"outc')
    worker = _Worker.__new__(_Worker)
    worker._received = b""
    worker.process = SimpleNamespace(stdout=os.fdopen(end, "rb"))
    assert worker.receive() == [{}, {"outcome": "wrong"}]
    os.write(start, b'ome": "correct"}\n')
    assert worker.receive() == [{"outcome": "correct"}]
    os.close(start)
    worker.process.stdout.close()


def matrix(*rows: str) -> str:
    return r"\begin{pmatrix} " + r" \\ ".join(rows) + r" \end{pmatrix}"


def test_changes_of_the_benchmark_change_the_answer():
    assert grading.rows_swapped(matrix("1 & 2", "3 & 4")) == matrix("3&4", "1&2")
    assert grading.transposed(matrix("1 & 2", "3 & 4")) == matrix("1&3", "2&4")
    assert grading.other_unit(r"15\mbox{ cm}^2") == r"15\mbox{ cm}^3"
    assert grading.with_bound("7") == r"7\text{ or more}" and grading.with_letter("x") is None
    assert grading.other_bracket("(3,4]") == "[3,4]" and grading.set_for_point("(1,2)") == r"\{1,2\}"
    assert grading.other_sign("1+2i") == "1-2i"
    pairs = grading.random_pairs(["1/2", "0.5", "3", "(1,2)", "(2,1)"], 10)
    assert {("(1,2)", "(2,1)"), ("3", "0.5")} <= set(pairs) and ("1/2", "0.5") not in pairs
