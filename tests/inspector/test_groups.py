"""The groups of an iteration: their table, where completions part, and the addresses of the views."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import pytest

from hapo_lite.algo.methods import Method
from hapo_lite.inspect import example, group_views
from hapo_lite.inspect.groups import groups_of, prefix_tree
from hapo_lite.inspect.places import Place
from hapo_lite.inspect.runs import entry_of, open_run
from hapo_lite.inspect.tabs.example import Example
from hapo_lite.inspect.tabs.run_place import find, trail
from hapo_lite.inspect.tokens import token_table, treated_tokens
from hapo_lite.runs.trace import write_traces
from hapo_lite.tiny.task import problems
from tests.inspector.traces import HOSTILE, make_trace, strip_known, trained


def naive_forks(texts: Sequence[Sequence[int]], one: int) -> set[int]:
    """The positions at which some other text that agreed so far does not go on as this one does."""
    mine = list(texts[one])
    others = [list(text) for i, text in enumerate(texts) if i != one]
    return {
        at
        for at in range(len(mine))
        for other in others
        if other[:at] == mine[:at] and (len(other) == at or other[at] != mine[at])
    }


@pytest.mark.parametrize(
    "texts",
    [
        [[1, 2, 3], [1, 2, 4], [1, 5], [9]],
        [[1, 2], [1, 2], [1, 3]],
        [[1], [1, 2], [1, 2, 3]],
        [[7, 7, 7]],
        [[3, 1], [1, 3], [3, 1, 2], [1, 3], [2]],
    ],
)
def test_completions_part_where_a_comparison_of_all_pairs_says(texts):
    tree = prefix_tree(texts)
    assert sorted(tree.order) == list(range(len(texts)))
    for i, branch in enumerate(tree.branches):
        forks = naive_forks(texts, i)
        assert branch.forks == sorted(forks)
        twins = any(j != i and text[: len(texts[i])] == texts[i] for j, text in enumerate(texts))
        assert branch.alone == (None if twins or not forks else max(forks))


def test_the_tree_worked_by_hand():
    tree = prefix_tree([[1, 2, 3], [1, 2, 4], [9]])
    assert tree.order == [0, 1, 2]
    assert [(b.forks, b.alone, b.shared) for b in tree.branches] == [([0, 2], 2, 0), ([0, 2], 2, 2), ([0], 0, 0)]


def test_a_group_says_what_is_recorded_and_what_is_not():
    fields = {"rewards": {"right": 1.0, "brief": -0.5}, "reward": 0.5, "group_size": 8, "group_correct": 3}
    traces = [make_trace(outcome="correct", **fields), make_trace(sample=4, texts=["a"] * 2, **fields)]
    [group] = groups_of([entry_of(trace, 3, i) for i, trace in enumerate(traces)])
    assert (group.size, group.correct, group.length) == (8, 3, 4.0)
    assert group.rewards == {"reward": 0.5, "right": 1.0, "brief": -0.5}
    assert group.entropy == pytest.approx((sum(traces[0].tokens["entropy"]) + 1.5) / 8)
    [old] = groups_of([entry_of(make_trace(outcome="correct"), 3, 0), entry_of(make_trace(sample=1), 3, 1)])
    assert (old.known, old.size, old.correct) == (False, 2, 1)


@pytest.mark.parametrize("prompt", [*HOSTILE, "a&b=c#d %25", "שלום", "x" * 3000, ""])
def test_an_address_names_its_place(prompt):
    place = Place("my run", 7, "train", prompt, 3)
    assert Place.parse(place.address) == place
    assert re.fullmatch(r"#[\w%&=.~-]*", place.address)


@pytest.mark.parametrize(
    "address", ["", "#", "#run", "#iteration=-1&completion=1e9", "#iteration=٣", "#a=%ff", "x" * 10**6]
)
def test_an_address_of_nonsense_names_nothing(address):
    assert Place.parse(address) == Place()


def test_a_place_that_is_gone_leads_to_the_nearest(tmp_path):
    update = trained(make_trace(iteration=1, prompt_id="q"), Method(), 0.5, [1.0] * 6)
    write_traces(tmp_path / "one" / "traces", 1, [make_trace(iteration=1), update])
    write_traces(tmp_path / "one" / "traces", 2, [make_trace(iteration=2)])
    run = open_run(tmp_path, "one")
    # Nothing of iteration 2 was trained, so the page opens on iteration 1.
    assert find(run, Place("one")).place == Place("one", 1)
    found = find(run, Place("one", 1, "train", "q", 1))
    assert (found.level, found.entry.place) == ("completion", 1)
    assert [place for _, place in trail(found)[0]] == [
        *(Place("one"), Place("one", 1), Place("one", 1, "train", "q"), Place("one", 1, "train", "q", 1))
    ]
    assert find(run, Place("one", 1, "train", "q", 7)).place == Place("one", 1, "train", "q")
    assert find(run, Place("one", 1, "train", "p", 1)).place == Place("one", 1)
    assert find(run, Place("one", 9, "eval", "p")).place == Place("one", 2, "eval", "p")


def test_hostile_text_in_groups_and_tables_is_text():
    traces = [
        make_trace([text, *HOSTILE], [0.5] * 7, outcome=text, prompt_id=text, sample=i, rewards={text: 1.0}, stage=text)
        for i, text in enumerate(HOSTILE)
    ]
    entries = [entry_of(trace, 0, i) for i, trace in enumerate(traces)]
    answers = group_views.example_answers(traces, [token_table(trace) for trace in traces])
    group = groups_of(entries)[0]
    pages = [
        group_views.prompt_table("<run>", 0, entries),
        group_views.group_page(answers, group, 0),
        group_views.group_facts(group, answers, [("<i>", "<script>")], "<gold>"),
        group_views.crumbs(Place("<run>", 0), [("<run>", Place("<run>"))], [("<b>", Place())], True),
    ]
    for page in pages:
        left = re.sub(r"</?(?:input|a|bdi|nav|caption|article|header|label)(?: [a-z-]+(?:=\"[^\"]*\")?)*>", "", page)
        assert "<" not in strip_known(left), strip_known(left)[:300]
    assert html.escape(HOSTILE[0]) in pages[0]


def test_the_recorded_example_is_a_group_of_the_bundled_task():
    traces = example.load()
    [problem] = [p for p in problems("test") if p.prompt == example.PROBLEM]
    assert (str(problem.answer), len(traces)) == (example.GOLD, example.GROUP)
    right = [trace for trace in traces if trace.outcome == "correct"]
    assert {trace.group_correct for trace in traces} == {len(right)} and 0 < len(right) < len(traces)
    assert all(rf"\boxed{{{example.GOLD}}}" in trace.text for trace in right)
    # B's advantages sum to zero over the tokens of a group.
    assert sum(sum(trace.tokens["advantage"]) for trace in traces) == pytest.approx(0.0, abs=1e-2)


@pytest.mark.slow
def test_the_recorded_example_is_what_its_command_writes():
    for made, kept in zip(example.record(), example.load(), strict=True):
        assert made.text == kept.text and made.outcome == kept.outcome
        assert made.tokens["credit"] == pytest.approx(kept.tokens["credit"], abs=1e-3)


def test_the_recorded_answer_under_dapo_has_one_temperature_and_one_credit():
    shown, other = Example().against_dapo()
    assert other.trace.tokens["id"] == shown.trace.tokens["id"]
    # DAPO: no adaptive temperature, bounds of 1 - 0.2 and 1 + 0.28, and the completion's advantage for each token.
    for name, value in {"temperature": 1.0, "weight": 1.0, "lower": 0.8, "upper": 1.28}.items():
        assert other.table.numbers[name] == pytest.approx([value] * len(other.table))
    assert not any(treated_tokens(other.trace).values()) and any(treated_tokens(shown.trace).values())
    assert other.table.numbers["entropy"] == shown.table.numbers["entropy"]
    assert len(set(shown.table.numbers["temperature"])) > 1 and len(set(shown.table.numbers["upper"])) > 1
    with pytest.raises(ValueError, match="adaptive temperature"):
        example.without_temperature(shown.trace, Method())
