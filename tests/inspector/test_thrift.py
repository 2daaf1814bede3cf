"""The page does nothing twice: a click fills only what it changes, and figures wait for their turn."""

from __future__ import annotations

import json

import gradio as gr
import pytest

from hapo_lite.inspect.places import Place
from hapo_lite.inspect.tabs.run import RunTab
from hapo_lite.inspect.tabs.state import Session
from hapo_lite.runs.trace import write_traces
from tests.inspector.browser import generated, open_completion, opened_page
from tests.inspector.traces import make_trace

COUNT_TURNS = """() => {
  window.turns = 0;
  window.draws = [];
  window.redraws = 0;
  const channel = new MessageChannel();
  channel.port1.onmessage = () => { window.turns += 1; channel.port2.postMessage(0); };
  channel.port2.postMessage(0);
  const { newPlot, relayout } = Plotly;
  Plotly.newPlot = (...all) => { window.draws.push(window.turns); return newPlot(...all); };
  Plotly.relayout = (...all) => { window.redraws += 1; return relayout(...all); };
}"""
"""A message that is sent again and again counts the tasks of the browser, and each figure notes the count."""


@pytest.fixture
def folder(tmp_path):
    """A run of two iterations with one completion in each."""
    folder = tmp_path / "runs" / "one"
    for iteration in (1, 2):
        write_traces(folder / "traces", iteration, [make_trace(iteration=iteration)])
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "reward/mean": 0.5}\n', "utf-8")
    return folder


@pytest.fixture
def tab(folder, state):
    with gr.Blocks():
        return RunTab(state(folder), gr.State())


def test_a_view_of_an_unchanged_run_is_filled_alone(tab, folder):
    session = Session()
    whole, group = Place("one"), Place("one", 2, "eval", "p")
    assert {tab.health, tab.timeline, tab.prompts} <= tab.go(session, whole).keys()
    opened = tab.go(session, group)
    assert tab.answers in opened and not {tab.health, tab.timeline, tab.problems} & opened.keys()
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"iteration": 2, "reward/mean": 0.75}) + "\n")
    assert "iteration 2" in tab.go(session, group)[tab.health]
    assert tab.health in tab.refresh(session, "one")


def test_the_prompts_of_all_iterations_are_listed_once(tab, folder):
    session = Session()
    tab.go(session, Place("one"))
    choices = tab.index(session)[tab.prompt].choices
    assert [name for _, name in choices] == ["eval: p"]
    assert tab.problems not in tab.index(session)
    write_traces(folder / "traces", 3, [make_trace(iteration=3)])
    tab.follow(session)
    assert tab.index(session)[tab.prompt].choices == [("eval: p: 3 completions", "eval: p")]


def test_a_completion_that_the_file_has_lost_is_named_where_it_would_stand(tab, folder):
    session = Session()
    place = Place("one", 2, "eval", "p", 1)
    write_traces(folder / "traces", 2, [make_trace(iteration=2), make_trace(iteration=2, sample=1)])
    tab.go(session, Place("one", 2))
    # The file loses a line between the listing of its completions and the reading of one.
    entries = tab.app.run("one").entries(2)
    session.run.entries = lambda iteration: entries
    write_traces(folder / "traces", 2, [make_trace(iteration=2)])
    lost = tab.go(session, place)
    assert "has been written anew" in lost[tab.view.summary] and lost[tab.view.tokens] == ""
    del session.run.entries
    assert "hapo-answer" in tab.go(session, place)[tab.answers]


def test_figures_take_turns_and_are_drawn_once(browser, address):
    with opened_page(browser, address, tab="") as page:
        page.wait_for_selector("#run-timeline .js-plotly-plot")
        page.evaluate(COUNT_TURNS)
        open_completion(page, "train")
        page.locator("#opened-figures .hapo-plot").first.scroll_into_view_if_needed()
        page.wait_for_selector("#opened-figures .js-plotly-plot >> nth=3")
        draws = page.evaluate("window.draws")
        assert len(draws) >= 4 and len(set(draws)) == len(draws)
        assert page.evaluate("window.redraws") == 0
        plots = page.locator("#opened-figures .js-plotly-plot")
        grids = plots.evaluate_all("(plots) => plots.map((plot) => plot.layout.xaxis.gridcolor)")
        assert set(grids) == {page.evaluate("window.HAPO_TEMPLATES.light['xaxis.gridcolor']")}


def test_the_browser_keeps_no_answer(browser, serve):
    """Gradio's history would write every answer to the disk, in the page's own thread."""
    with opened_page(browser, serve()) as page:
        generated(page)
        page.wait_for_timeout(500)
        assert not page.evaluate("[localStorage, sessionStorage].flatMap(Object.values).filter((v) => v.length > 200)")
