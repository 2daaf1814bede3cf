"""Runs that the inspector opens: whole ones, broken ones, foreign values, links that lead out."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from pathlib import Path

import pytest

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError
from hapo_lite.inspect import views
from hapo_lite.inspect.runs import open_run, run_names
from hapo_lite.runs.trace import read_traces, write_traces
from tests.inspector.traces import make_trace, strip_known, trained


@pytest.fixture
def run_folder(tmp_path) -> Path:
    root = tmp_path / "runs"
    for iteration in (0, 1, 2):
        traces = [trained(make_trace(iteration=iteration), Method(), 0.5, [1.0, 0.6, 1.0, 1.2, 1.0, 1.0])]
        write_traces(root / "one" / "traces", iteration, [make_trace(iteration=iteration, outcome="correct"), *traces])
    (root / "one" / "metrics.jsonl").write_text('{"iteration": 0, "reward/mean": 0.5}\nnonsense\n{"x": 1}\n', "utf-8")
    (root / "empty").mkdir()
    return root


def test_a_run_without_a_recipe_says_what_is_assumed(run_folder):
    [problem] = open_run(run_folder, "one").recipe_problems
    assert "recipe.yaml" in problem and "assumed" in problem


def test_which_tokens_were_treated_is_named(run_folder):
    page = html.unescape(views.treated(open_run(run_folder, "one").entries(1)[0]))
    rows = re.findall(r"<td>([^<]*)</td><td[^>]*>(\d+)</td><td>([^<]*)</td>", page)
    assert ("clipped low", "1", "·b ×1") in rows
    assert [name for name, *_ in rows] == ["amplified", "suppressed", "clipped low", "clipped high"]


def test_a_run_opens(run_folder):
    run = open_run(run_folder, "one")
    assert run_names(run_folder) == ["one"]
    assert run.iterations() == [0, 1, 2]
    entries, problems = run.entries(1)
    assert [e.stage for e in entries] == ["eval", "train"] and not problems
    assert entries[1].treated["clipped low"] == {" b": 1}
    assert {name: len(found) for name, found in run.prompts().items()} == {"eval: p": 3, "train: p": 3}
    assert "hapo-card" in views.over_training(run, run.prompts()["eval: p"])
    assert "suppressed" in views.treated(entries)
    lines, problems = run.metrics()
    assert len(lines) == 1
    assert problems == [f"{run.path}/metrics.jsonl:{n}: not a line of metrics" for n in (2, 3)]
    assert "hapo-figure" in views.curves(run)[0]


@pytest.mark.parametrize("name", ["../secret", "..", ".", "", "/etc", "one/../../secret"])
def test_file_choices_stay_inside(run_folder, name):
    (run_folder.parent / "secret" / "traces").mkdir(parents=True)
    with pytest.raises(UserError):
        open_run(run_folder, name)


def test_links_out_of_the_run_are_not_followed(run_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text((run_folder / "one/traces/000000.jsonl").read_text("utf-8"), "utf-8")
    (run_folder / "one/traces/000007.jsonl").symlink_to(elsewhere)
    traces, [problem] = open_run(run_folder, "one").traces(7)
    assert not traces and "leads out of" in problem


def test_a_broken_line_is_named_and_the_rest_opens(run_folder):
    file = run_folder / "one/traces/000001.jsonl"
    good = file.read_text("utf-8").splitlines()
    text_for_numbers = json.loads(good[0])
    text_for_numbers["tokens"]["entropy"] = ["<b>"] * 6
    file.write_text("\n".join([good[0], '{"a": 1}', "not json", json.dumps(text_for_numbers)]) + "\n", "utf-8")
    run = open_run(run_folder, "one")
    entries, problems = run.entries(1)
    assert len(entries) == 1
    assert f"{file}:2" in problems[0] and f"{file}:3" in problems[1] and f"{file}:4: " in problems[2]
    assert len(run.entries(2)[0]) == 2
    with pytest.raises(UserError, match=":2: "):
        read_traces(file)


BAD_SIGNAL = {"pivot": math.nan, "sigma": 1.0, "high": 1.0, "low": 1.0}
ATTACKS = [["<img src=x>"] * 6, ['"><script>'] * 6]
FOREIGN = [None, 7, "x", [], {}, [["<b>"]], [math.inf] * 6, [-1] * 6, [10**30] * 6, BAD_SIGNAL, *ATTACKS]


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: repr(value)[:12])
def test_foreign_values_are_named_or_shown_as_text(tmp_path, value):
    """Whatever stands in a field: a sentence with file and line, or a page without a tag that is not ours."""
    whole = dataclasses.asdict(trained(make_trace(), Method(), 0.5, [1.0, 0.6, 1.0, 1.2, 1.0, 1.0]))
    lines = [json.dumps(whole | {name: value}) for name in whole]
    for name in (*whole["tokens"], "alternatives"):
        lines.append(json.dumps(whole | {"tokens": whole["tokens"] | {name: value}}))
    file = tmp_path / "one/traces/000000.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(lines), "utf-8")
    run = open_run(tmp_path, "one")
    entries, problems = run.entries(0)
    traces, unread = run.traces(0)
    assert len(traces) + len(unread) == len(lines)
    for problem in problems:
        assert re.match(rf"{file}:\d+: ", problem)
    assert len(entries) == len(traces)
    for trace in traces:
        page = "".join(dataclasses.astuple(views.generation(trace, run.table(trace), Method())))
        assert "<" not in strip_known(page + views.treated(entries))


def test_text_that_is_no_utf8_is_named(run_folder):
    file = run_folder / "one/traces/000001.jsonl"
    good = file.read_bytes().splitlines()
    surrogate = good[0].replace(b'"why?"', b'"\\ud800"')
    file.write_bytes(b"\n".join([good[0], b"\xff" + good[1], surrogate, good[1]]))
    traces, problems = open_run(run_folder, "one").traces(1)
    assert len(traces) == 2
    assert [p.split(": ")[0] for p in problems] == [f"{file}:2", f"{file}:3"]


def test_a_live_run_is_read_again(run_folder):
    run = open_run(run_folder, "one")
    assert len(run.entries(2)[0]) == 2
    write_traces(run_folder / "one/traces", 2, [make_trace()])
    write_traces(run_folder / "one/traces", 3, [make_trace()])
    assert len(run.entries(2)[0]) == 1 and run.iterations() == [0, 1, 2, 3]
