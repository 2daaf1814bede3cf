"""Rewards: the built-in one, the overlong penalty, and functions that users bring."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from hapo_lite.errors import UserError
from hapo_lite.recipe import RewardSettings
from hapo_lite.records import Prompt, Score
from hapo_lite.tasks.functions import soft_overlong_penalty
from hapo_lite.tasks.own_code import code_of, load_function
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.train import run

PROMPT = Prompt("p", (("system", "Be brief."), ("user", "1+1=?")), "2")
BOXES = (r"\boxed{2}", r"\boxed{3}")
GUIDE = Path(__file__).parents[1] / "docs" / "rewards.md"


def score(settings: RewardSettings, *completions: str, length: int = 10, truncated: bool = False) -> list[Score]:
    n = len(completions)
    with Scorer(settings, max_new_tokens=100) as scorer:
        return scorer.score([PROMPT] * n, completions, [length] * n, [truncated] * n)


def own(tmp_path: Path, body: str) -> RewardSettings:
    (tmp_path / "mine.py").write_text("def reward(prompts, completions, answers):\n    " + body + "\n")
    return RewardSettings(function=f"{tmp_path / 'mine.py'}:reward")


def test_a_thought_that_the_prompt_opened_and_nobody_closed_holds_no_answer(tmp_path):
    """And functions are handed the completion as it is."""
    settings = own(tmp_path, "return [float(text.startswith('So')) for text in completions]")
    texts = [r"So \boxed{2}", r"So \boxed{3}. </think> It is \boxed{2}"]
    for opening, outcomes in (("", ["correct", "correct"]), ("<think>", ["unparseable", "correct"])):
        with Scorer(settings, max_new_tokens=100) as scorer:
            scorer.opening = opening
            scores = scorer.score([PROMPT] * 2, texts, [10, 10], [True, False])
        assert [s.outcome for s in scores] == outcomes and [s.reward for s in scores] == [1.0, 1.0]


def test_right_and_wrong_earn_what_the_recipe_says():
    scores = score(RewardSettings(correct=2.0, wrong=-0.5), r"\boxed{2}", r"\boxed{3}", "dunno")
    assert scores == [
        Score(2.0, True, "correct", "2"),
        Score(-0.5, False, "wrong", "3"),
        Score(-0.5, False, "unparseable", None),
    ]


def test_a_truncated_completion_is_graded_by_its_box_alone():
    texts = (r"First \boxed{2} and then", "The answer is 2")
    assert [s.outcome for s in score(RewardSettings(), *texts, truncated=True)] == ["correct", "unparseable"]
    assert [s.outcome for s in score(RewardSettings(), *texts)] == ["correct", "correct"]


def test_a_truncated_completion_may_have_said_it_in_a_tag_but_not_in_thought():
    texts = ("<answer>2</answer> and then", r"<think>\boxed{2} and then")
    assert [s.outcome for s in score(RewardSettings(), *texts, truncated=True)] == ["correct", "unparseable"]


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (100, -0.5), (120, -0.5)]
)
def test_overlong_penalty_is_a_ramp(length, expected):
    # DAPO Eq. 13 with max 100 and buffer 20, times a penalty of 0.5: at 90 tokens half of it.
    assert soft_overlong_penalty(length, 100, 20, 0.5) == pytest.approx(expected)


def test_overlong_penalty_off_and_added():
    assert soft_overlong_penalty(100, 100, 0) == 0.0
    settings = RewardSettings(overlong_buffer=20, overlong_penalty=0.5)
    assert [s.reward for s in score(settings, r"\boxed{2}", "no", length=90)] == [0.75, -0.25]


def test_own_function_gets_the_question_and_accuracy_stays(tmp_path):
    settings = own(tmp_path, "return [len(p) + len(c) + float(a) for p, c, a in zip(prompts, completions, answers)]")
    assert score(settings, r"\boxed{2}", "") == [
        Score(16.0, True, "correct", "2"),
        Score(7.0, False, "unparseable", None),
    ]


def test_own_function_may_return_arrays_and_tensors(tmp_path):
    assert [s.reward for s in score(own(tmp_path, "import numpy as np; return np.float32([1, 2])"), *BOXES)] == [1, 2]
    assert [s.reward for s in score(own(tmp_path, "import torch; return torch.tensor([1, 2])"), *BOXES)] == [1, 2]


def test_nan_and_inf_are_left_to_the_loop_which_skips_them(tmp_path):
    rewards = [s.reward for s in score(own(tmp_path, "return [float('nan'), float('inf')]"), *BOXES)]
    assert math.isnan(rewards[0]) and math.isinf(rewards[1])


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return [1.0]", r"mine\.py:reward returned 1 reward for 2 completions"),
        ("return ['1', 2]", r"returned '1' for completion 0"),
        ("return [None, 2]", r"returned None for completion 0"),
        ("return [10**400, 2]", r"for completion 0"),
        ("return None", r"returned NoneType"),
        ("return '12'", r"returned str"),
        ("return [1 / 0 for _ in prompts]", r"raised ZeroDivisionError: division by zero at .*mine\.py:2"),
        ("return (1 / 0 for _ in prompts)", r"raised ZeroDivisionError: division by zero at .*mine\.py:2"),
        ("import json; return json.loads('{')", r"raised JSONDecodeError: .* at .*mine\.py:2"),
        ("raise SystemExit(0)", r"raised SystemExit: 0 at .*mine\.py:2"),
        ("raise ValueError('one\\ntwo')", r"raised ValueError: one two at .*mine\.py:2"),
        ("return [p + 1 for p in prompts]", r"raised TypeError: can only concatenate str .* at .*mine\.py:2"),
        ("return grade(prompts)\n\ndef grade():\n    ...", r"raised TypeError: grade\(\) takes 0 .* at .*mine\.py:2"),
        ("return reward(prompts, completions, answers)", r"raised RecursionError: .* at .*mine\.py:2"),
    ],
)
def test_what_an_own_function_does_amiss_is_said(tmp_path, body, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        score(own(tmp_path, body), *BOXES)
    assert "\n" not in str(caught.value)


def test_functions_that_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("unwell.py").write_text("import json\n\nraise RuntimeError('no')\n")
    Path("askew.py").write_text("def f(:\n")
    Path("needy.py").write_text("import not_installed_at_all\n")
    Path("leaving.py").write_text("import sys\nsys.exit('usage: leaving FILE')\n")
    Path("fine.py").write_text("def brevity(p, c, a):\n    return [0.0] * len(c)\n")
    for name, complaint in [
        ("fine", "not of the form module:function"),
        ("nowhere_to_be_found:f", "no module 'nowhere_to_be_found'"),
        ("nowhere.py:f", "there is no file"),
        ("fine:brevty", "no function 'brevty'; it has brevity"),
        ("unwell:f", r"importing unwell raised RuntimeError: no at .*unwell\.py:3"),
        ("unwell.py:f", r"importing unwell\.py raised RuntimeError: no at .*unwell\.py:3"),
        ("askew:f", r"SyntaxError: .* at .*askew\.py:1"),
        ("needy:f", r"ModuleNotFoundError: .*not_installed_at_all"),
        ("leaving:f", r"SystemExit: usage: leaving FILE at .*leaving\.py:2"),
    ]:
        with pytest.raises(UserError, match=complaint):
            load_function(name)
    assert load_function("fine:brevity")([], ["a"], []) == [0.0]


@pytest.mark.parametrize(
    ("definition", "complaint"),
    [
        ("def judge(prompts, completions)", r"takes \(prompts, completions\), and it is handed .*too many positional"),
        ("def judge(prompts, completions, answers, level)", r"missing a required argument: 'level'\)"),
        ("def judge(prompts, *, completions, answers)", r"too many positional"),
        ("def judge(completions, answers, prompts)", r"so prompts as completions: change it, or name it in"),
        ("def judge(prompts, completions, truncated)", r"so answers as truncated: "),
        ("async def judge(p, c, a)", r"is async, and only reward\.functions awaits"),
    ],
)
def test_a_wrong_signature_is_refused_before_the_data_are_read(tmp_path, make_recipe, definition, complaint):
    path = tmp_path / "judges.py"
    path.write_text(f"{definition}:\n    ...\n")
    recipe = make_recipe(f"reward.function={path}:judge", "data.source=nowhere.jsonl")
    with pytest.raises(UserError, match=complaint) as caught:
        run.train(recipe)
    assert f"reward.function {path}:judge" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "definition",
    ["def judge(p, c, a)", "def judge(*lists)", "def judge(p, c, a, level=1)", "def judge(p, *rest, **more)"],
)
def test_a_function_that_takes_three_lists_by_place_is_called(tmp_path, definition):
    path = tmp_path / "judges.py"
    path.write_text(f"{definition}:\n    return [1.0, 2.0]\n")
    assert [s.reward for s in score(RewardSettings(function=f"{path}:judge"), *BOXES)] == [1.0, 2.0]


def test_the_example_of_the_guide_works(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    named = re.search(r"function: (\S+)", GUIDE.read_text(encoding="utf-8")).group(1)
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(code)
    right, wrong = score(RewardSettings(function=named), r"\boxed{2}" + " " * 991, r"\boxed{3}")
    assert right.reward == pytest.approx(0.9)
    assert wrong.reward == pytest.approx(-0.0009)


def test_unequal_lengths_are_a_mistake_of_the_caller():
    with Scorer(RewardSettings(), 100) as scorer, pytest.raises(ValueError, match="as many"):
        scorer.score([PROMPT], ["a", "b"], [1, 1], [False, False])


@pytest.mark.parametrize("form", ["{folder}/theirs.py:score", "theirs:score"])
def test_the_file_of_a_reward_is_named_before_it_is_run(tmp_path, monkeypatch, make_recipe, capsys, form):
    (tmp_path / "theirs.py").write_text("raise RuntimeError('it was run')")
    monkeypatch.chdir(tmp_path)
    name = form.format(folder=tmp_path)
    assert code_of(name) == str(tmp_path / "theirs.py")
    with pytest.raises(UserError, match="it was run"):
        run.train(make_recipe(f"reward.function={name}"))
    assert f"runs with your rights: {tmp_path / 'theirs.py'}\n" in capsys.readouterr().out
