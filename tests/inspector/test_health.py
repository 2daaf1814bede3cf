"""The health of a run: its verdict, its warnings where they fell, and the time of its stages."""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go
import pytest

from hapo_lite.inspect import health_views
from hapo_lite.inspect.health import Warned, health, warnings
from hapo_lite.inspect.runs import open_run
from hapo_lite.train.verdict import judge_run
from tests.inspector.browser import opened_page
from tests.inspector.traces import strip_known

RECIPE = "model: {name: tiny}\ndata: {source: tiny}\nmethod: hapo\ntraining: {iterations: 40}\n"


def make_lines(count: int) -> list[dict]:
    """Metrics of a run that learns a little. Iteration 3 skips updates, 5 jumps, and from 8 on answers are cut off."""
    lines = [{"iteration": 0, "eval/solved": [0, 0, 1, 0], "eval/accuracy": 0.0, "seconds/evaluate": 2.0}]
    for i in range(1, count + 1):
        lines.append(
            {
                **{"iteration": i, "updates": 4 * i, "tokens": 1000 * i, "reward/mean": 0.01 * i},
                **{"reward/correct_share": 0.5, "groups/equal_share": 0.2, "groups/discarded": 0},
                **{"seconds/rollout": 1.5, "seconds/update": 0.5, "seconds/iteration": 2.0},
                **{"tokens_per_second/sampled": 500.0, "memory/peak_mb": 300.0 + i, "update/skipped": 2 * (i == 3)},
                **{"ratio/kl_old": 0.5 if i == 5 else 1e-3, "length/truncated_share": 0.3 if i >= 8 else 0.0},
            }
        )
    return lines


@pytest.fixture
def sick(tmp_path):
    """A run in the middle of its training."""
    folder = tmp_path / "runs" / "sick"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in make_lines(10)), "utf-8")
    return folder


def test_warnings_stand_at_the_iteration_at_which_they_fell():
    found = warnings(make_lines(10))
    assert [(one.iteration, one.sentence[:18]) for one in found] == [
        (3, "2 updates skipped,"),
        (5, "the policy jumped "),
        (8, "30 % of the comple"),
    ]
    collapsing = [{"iteration": i, "entropy/all_mean": 1.0 if i < 5 else 0.1} for i in range(12)]
    assert [one.iteration for one in warnings(collapsing)] == [7]
    assert warnings([{"iteration": 1, "memory/shortages": 1}])[0].sentence.startswith("memory ran out 1 time,")


def test_the_verdict_is_that_of_the_run_or_that_so_far(sick):
    run = open_run(sick.parent, "sick")
    state = health(run, make_lines(10))
    assert (state.verdict.word, state.final) == ("not measured", False)
    better = [*make_lines(10), {**make_lines(11)[-1], "eval/solved": [8, 8, 8, 7]}]
    assert health(run, better).verdict.word == judge_run(better, run.recipe).word == "sharpened"
    verdict = {"word": "<b>", "sentence": "<b>: <script>", "because": ["<img>"]}
    (sick / "summary.json").write_text(json.dumps({"verdict": verdict}), "utf-8")
    state = health(run, make_lines(10))
    assert state.final and state.verdict.word == "<b>"
    page = health_views.health_html("<i>", state, make_lines(10), "<u>")
    left = re.sub(r"</?(?:ul|li|a)(?: [a-z-]+(?:=\"[^\"]*\")?)*>", "", page)
    assert "<" not in strip_known(left)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"verdict": 7}', '{"verdict": {"word": [], "sentence": 1}}', "\ud800"]
)
def test_a_foreign_summary_and_foreign_metrics_say_nothing(sick, text):
    (sick / "summary.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    run = open_run(sick.parent, "sick")
    foreign = [{"iteration": i, "update/skipped": "<b>", "entropy/all_mean": [1], "length/mean": {}} for i in range(9)]
    state = health(run, foreign)
    assert state.verdict is None and not state.warnings
    assert "No verdict yet" in health_views.health_html("sick", state, foreign, "")
    assert health_views.health_figures(foreign, []) == ""


def test_the_stages_stand_on_one_another():
    lines = make_lines(10)
    figure = health_views.stages_figure(lines, [Warned(3, "<b>no</b>")])
    seconds = {series["name"]: series["y"] for series in figure["data"][:-1]}
    assert seconds == {"rollout": [0.0, *[1.5] * 10], "update": [0.0, *[0.5] * 10], "evaluate": [2.0, *[0.0] * 10]}
    assert figure["data"][0]["x"] == list(range(11)) and figure["layout"]["barmode"] == "stack"
    assert figure["data"][-1]["text"] == ["iteration 3: &lt;b&gt;no&lt;/b&gt;"]
    assert go.Figure(data=figure["data"], layout=figure["layout"]).data


def test_a_bar_of_a_long_run_is_the_mean_of_several_iterations():
    lines = [{"iteration": i, "seconds/rollout": float(i)} for i in range(1, 501)]
    [bars] = health_views.stages_figure(lines, [])["data"]
    assert (bars["x"][:3], bars["y"][:3]) == ([1, 6, 11], [3.0, 8.0, 13.0]) and len(bars["x"]) == 100


def test_the_page_of_a_run_that_trains_shows_its_health(browser, serve, sick):
    with opened_page(browser, serve("--run", str(sick)), tab="") as page:
        page.wait_for_selector("#run-health .hapo-verdict:has-text('So far: not measured')")
        assert page.locator("#run-health .hapo-warnings li").count() == 3
        assert page.get_by_role("link", name="iteration 5").get_attribute("href") == "#run=sick&iteration=5"
        page.wait_for_selector("#run-timeline .js-plotly-plot >> nth=3")
        with (sick / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(make_lines(11)[-1]) + "\n")
        page.wait_for_selector("#run-health .hapo-chip:has-text('iteration 11')")
        # While Plotly draws the figure anew, there is a plot without data for a moment.
        first = "document.querySelector('#run-timeline .js-plotly-plot')"
        page.wait_for_function(f"{first}?.data?.[0].x.length === 11")
