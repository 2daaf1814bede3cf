"""Which completions of a group are traced, and what a trace says of its group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hapo_lite.records import Graded
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.trace import read_traces, write_traces
from hapo_lite.train.traces import GroupCount, choose_traced, count_groups


def make_graded(*groups: str) -> Graded:
    """Groups of completions: r is a right one, w a wrong one."""
    completions = [SimpleNamespace(prompt=SimpleNamespace(index=i)) for i, group in enumerate(groups) for _ in group]
    return Graded(completions, [SimpleNamespace(correct=kind == "r") for group in groups for kind in group])


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (0, []),
        (3, [0, 1, 4]),
        (4, [0, 1, 4, 6]),  # one right and one wrong of each group, of which the second has no wrong one
        (6, [0, 1, 2, 3, 4, 6]),  # then the rest, group by group
        (99, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_first_one_right_and_one_wrong_of_each_group_and_then_the_rest(count, chosen):
    assert choose_traced(make_graded("rwwr", "rr", "ww"), count) == chosen


def test_a_trace_says_how_large_its_group_was(make_recipe, make_loop, tmp_path):
    loop = make_loop(make_recipe("logging.traces_per_iteration=999"))
    _, _, traces = loop.step(TrainState())
    write_traces(tmp_path, 1, traces)
    kept = read_traces(tmp_path / "000001.jsonl")
    rollout = loop.recipe.rollout
    assert len(kept) == rollout.prompts_per_iteration * rollout.completions_per_prompt
    for trace in kept:
        group = [other for other in kept if other.prompt_id == trace.prompt_id]
        assert trace.group_size == len(group) == rollout.completions_per_prompt
        assert trace.group_correct == sum(other.outcome == "correct" for other in group)


def test_groups_are_counted():
    graded = make_graded("rwwr", "rr")
    assert count_groups(graded.completions, graded.scores) == {0: GroupCount(4, 2), 1: GroupCount(2, 2)}
