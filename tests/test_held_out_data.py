"""Problems that a run is evaluated on are not trained on, or the run says so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from hapo_lite.errors import UserError
from hapo_lite.recipe import DataSettings, EvaluationSettings
from hapo_lite.train.prompts import load_data
from tests.rows import jsonl


def rows_of(folder: Path, name: str, numbers: Iterable[int]) -> str:
    return str(jsonl(folder, *({"problem": f"{i}+{i}?", "answer": str(2 * i)} for i in numbers), name=name))


def test_a_problem_of_the_evaluation_is_not_trained_on(tmp_path):
    """Whatever its id and its system prompt."""
    said: list[str] = []
    data = DataSettings(source=rows_of(tmp_path, "mine.jsonl", range(20)), system_prompt="Add.")
    other = DataSettings(source=rows_of(tmp_path, "test.jsonl", range(30, 11, -1)), system_prompt=None)
    found = load_data(data, EvaluationSettings(prompts=16, data=other), 0, said.append)
    asked = {prompt.messages[-1] for prompt in found.held_out}
    assert len(found.held_out) == 16 and not asked & {prompt.messages[-1] for prompt in found.training}
    assert [prompt.answer for prompt in found.training] == [str(2 * i) for i in range(15)]
    assert said == ["data: 5 problems of the evaluation are not trained on"]
    with pytest.raises(UserError, match=r"hold out every problem of data\.source"):
        load_data(data, EvaluationSettings(prompts=20, data=data), 0, said.append)


def test_the_built_in_test_split_is_not_trained_on_where_it_is_evaluated():
    data = DataSettings(source="tiny", split="test", limit=200)
    found = load_data(data, EvaluationSettings(prompts=64), 0, lambda text: None)
    trained, held_out = ({p.messages for p in prompts} for prompts in (found.training, found.held_out))
    assert (len(trained), len(held_out)) == (136, 64) and not trained & held_out


@pytest.mark.parametrize(
    ("earlier", "seen"),
    [
        (["evaluation.prompts=0"], 8),
        (["evaluation.prompts=8"], 0),
        (["evaluation.prompts=8", "seed=5"], None),
        (["evaluation.prompts=16"], None),
        (["evaluation.data.source=other.jsonl"], 8),
        (["data.limit=30", "evaluation.prompts=0"], 0),
    ],
)
def test_a_run_says_what_the_run_before_it_was_trained_on(tmp_path, make_recipe, earlier, seen):
    """Counted against the problems that the earlier run reads, where that is the same data."""
    source = f"data.source={rows_of(tmp_path, 'mine.jsonl', range(40))}"
    now, before = make_recipe(source, "evaluation.prompts=8"), make_recipe(source, *earlier)
    said: list[str] = []
    held_out = load_data(now.data, now.evaluation, now.seed, said.append, before=before).held_out
    if seen is None:
        trained = load_data(before.data, before.evaluation, before.seed, lambda text: None).training
        seen = len({p.messages for p in held_out} & {p.messages for p in trained})
    notes = [sentence for sentence in said if "were trained on by the run" in sentence]
    assert notes == [] if seen == 0 else f"{seen} of 8 held-out prompts" in notes[0]
