"""Worked solutions of data sets as the text to learn, each with its answer in a box."""

from __future__ import annotations

import pytest

from hapo_lite.tasks.data import load_prompts
from hapo_lite.tasks.solutions import worked_solution
from hapo_lite.tasks.verify import grade, marked_answer
from hapo_lite.tiny.task import problems, worked_out
from tests.rows import jsonl

GSM8K = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Altogether she sold 48+24 = <<48+24=72>>72 clips, for $<<72*20=1440>>1,440.\n#### 1,440"
)


@pytest.mark.parametrize(
    ("value", "answer", "text"),
    [
        (
            GSM8K,
            "1440",
            "Natalia sold 48/2 = 24 clips in May.\nAltogether she sold 48+24 = 72 clips, for $1,440.\n\\boxed{1440}",
        ),
        (r"It is even, so $x = \boxed{4}$.", "4", r"It is even, so $x = \boxed{4}$."),
        ("Half of 8 is 4.", "4", "Half of 8 is 4.\nThe answer is \\boxed{4}."),
        ("We get <answer>4</answer>", "4", "We get <answer>4</answer>"),
        ("1 << 3 is 8, and 2 >> 1 is 1.", "8", "1 << 3 is 8, and 2 >> 1 is 1.\nThe answer is \\boxed{8}."),
        ("4", "4", ""),
        ("#### 4", "4", ""),
        (r"\boxed{4}", "4", ""),
        ("$4$.", "4", ""),
        ("  ", "4", ""),
        (None, "4", ""),
        (4, "4", ""),
    ],
)
def test_a_solution_ends_in_the_boxed_answer(value, answer, text):
    assert worked_solution(value, answer) == text
    if text:
        assert marked_answer(text) == answer


def test_the_built_in_solutions_are_right_and_always_the_same():
    chosen = problems("train")[:300]
    texts = [worked_out(problem) for problem in chosen]
    assert texts == [worked_out(problem) for problem in chosen]
    assert all(grade(text, str(problem.answer)).correct for text, problem in zip(texts, chosen, strict=True))
    assert all("then" in text for text in texts) and len({text.split()[0] for text in texts}) == 3


def test_solutions_are_read_beside_the_same_prompts(tmp_path, make_recipe):
    rows = [
        {"question": "One and one?", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
        {"question": "Two and two?", "answer": "#### 4"},
        {"question": "Again: one and one?", "answer": None},
    ]
    data = make_recipe(f"data.source={jsonl(tmp_path, *rows)}", "data.system_prompt=null").data
    plain, worked = load_prompts(data), load_prompts(data, solutions=True)
    assert [p.answer for p in plain.prompts] == ["2", "4"] == [p.answer for p in worked.prompts]
    assert [p.solution for p in plain.prompts] == ["", ""]
    assert [p.solution for p in worked.prompts] == ["1+1 = 2\n\\boxed{2}", ""]
    assert plain.skipped == worked.skipped == {"no answer": 1}
