"""Kinds of answers that a grader gets wrong (benchmarks/grading_pairs.py), and the answer that counts in a text."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from benchmarks import grading
from benchmarks.grading_pairs import RIGHT, WRONG, matrix
from hapo_lite.tasks.answers import find
from hapo_lite.tasks.grader import _Worker
from hapo_lite.tasks.verify import GraderPool, marked_answer
from tests.test_verify import box

UNPARSEABLE = "unparseable"


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


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        ("<think>It could be 12.</think><answer>15</answer>", "12", "wrong"),
        ("<think>It could be 12.</think><answer>15</answer>", "15", "correct"),
        ("<answer>42</answer>", "42", "correct"),
        ("<answer>\n 42 </answer>", "42", "correct"),
        (r"<answer>\boxed{42}</answer>", "42", "correct"),
        (r"<answer>42</answer> or \boxed{41}", "42", "correct"),
        (r"<answer>41</answer> or \boxed{42}", "42", "wrong"),
        (r"<answer></answer> \boxed{42}", "42", "correct"),
        ("The answer is 42. <answer>4", "42", UNPARSEABLE),
        (r"<think>\boxed{42}</think>", "42", UNPARSEABLE),
        (r"<think>\boxed{42}", "42", UNPARSEABLE),
        (r"the prompt began it \boxed{42}</think> The answer is 41.", "42", "wrong"),
        (r"\boxed{42}<think>or \boxed{7}</think>", "42", "correct"),
        ("<think>The answer is 12.</think> I give up.", "12", UNPARSEABLE),
        (r"The answer is 41, that is, \boxed{42}", "42", "correct"),
    ],
)
def test_the_tag_counts_before_the_box_and_thoughts_do_not_count(pool, completion, gold, outcome):
    assert pool.grade_many([(completion, gold)])[0].outcome == outcome


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        (r"\boxed{3} or \boxed{5}", "5", "wrong"),
        (r"\boxed{3} or \boxed{5}", "3", "wrong"),
        (r"\boxed{3}\boxed{5}", "5", "wrong"),
        (r"either \boxed{3}, or maybe \boxed{5}", "5", "wrong"),
        (r"$x=\boxed{3}$ or $x=\boxed{5}$", "5", "wrong"),
        (r"The answer is \boxed{3} (or it could be \boxed{5}).", "5", "wrong"),
        (r"\boxed{3}. The answer is \boxed{5}", "5", "correct"),
        (r"\boxed{3} becomes \boxed{5}", "5", "correct"),
        ("<answer>3</answer> <answer>5</answer>", "5", "wrong"),
        ("<answer>3 or 5</answer>", "5", "wrong"),
        (r"\boxed{5}, \boxed{3}", "3, 5", "correct"),
        (r"$x=\boxed{3}$ and $y=\boxed{5}$", "(3,5)", "correct"),
        (r"\boxed{3} apples and \boxed{5} pears", "3, 5", "correct"),
        (r"\boxed{5} \boxed{5}", "5", "correct"),
        (r"\boxed{\frac12} or \boxed{0.5}", "1/2", "correct"),
        (r"First \boxed{3}. We add 2 and get \boxed{5}", "5", "correct"),
        (r"\boxed{3}. No, wait: \boxed{5}", "5", "correct"),
    ],
)
def test_boxes_at_the_end_are_one_answer(pool, completion, gold, outcome):
    assert pool.grade_many([(completion, gold)])[0].outcome == outcome


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        ("It starts at $12:00$", "12:00", "correct"),
        ("It starts at $12:00$.", "12:30", "wrong"),
        ("So it ends at $3:45$", "3:45", "correct"),
        ("The answer is 5:30 pm.", "5:30 am", "wrong"),
        ("The answer is $2$ or more.", "2", "wrong"),
        ("The answer is 8 million.", "8", "wrong"),
        ("The answer is 8 million.", "8000000", "correct"),
        ("The answer is 42 apples in total.", "42", "correct"),
        ("The answer is 3 hours and 20 minutes.", r"3\text{ hours }25\text{ minutes}", "wrong"),
        ("The total is $8 cents$", r"\$8", "wrong"),
        ("The total is 8 cents", r"\$8", "wrong"),
        ("It comes to 8 million", "8", "wrong"),
        ("It comes to 6t", "6", "wrong"),
        ("We have $12$ of them, and hence 15.", "15", "correct"),
        ("So there are 28 percent", "28%", "correct"),
    ],
)
def test_a_statement_and_its_words(pool, completion, gold, outcome):
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
        started = time.perf_counter()
        find(megabyte)
        took.append(time.perf_counter() - started)
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


def test_changes_of_the_benchmark_change_the_answer():
    assert grading.rows_swapped(matrix("1 & 2", "3 & 4")) == matrix("3&4", "1&2")
    assert grading.transposed(matrix("1 & 2", "3 & 4")) == matrix("1&3", "2&4")
    assert grading.other_unit(r"15\mbox{ cm}^2") == r"15\mbox{ cm}^3"
    assert grading.with_bound("7") == r"7\text{ or more}" and grading.with_letter("x") is None
    assert grading.other_bracket("(3,4]") == "[3,4]" and grading.set_for_point("(1,2)") == r"\{1,2\}"
    assert grading.other_sign("1+2i") == "1-2i"
    pairs = grading.random_pairs(["1/2", "0.5", "3", "(1,2)", "(2,1)"], 10)
    assert {("(1,2)", "(2,1)"), ("3", "0.5")} <= set(pairs) and ("1/2", "0.5") not in pairs
