"""The metrics of a run that is being written: what is added is read once, and a resumed run is shown right."""

from __future__ import annotations

import json
import os
import random

import gradio as gr
import pytest

from hapo_lite.inspect import figures, health_views
from hapo_lite.inspect.health import Warned
from hapo_lite.inspect.metrics_log import MetricsLog
from hapo_lite.inspect.places import Place
from hapo_lite.inspect.tabs import run as run_tab
from hapo_lite.inspect.tabs.state import Session
from hapo_lite.runs.lines import MetricsFile
from hapo_lite.runs.trace import write_traces
from tests.inspector.traces import make_trace


def line(iteration: int, reward: float = 0.5) -> dict:
    return {"iteration": iteration, "reward/mean": reward, "note": "x" * 200}


@pytest.fixture
def file(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for iteration in range(50):
        file.append(line(iteration))
    return file


def seen(log: MetricsLog) -> tuple[list[int], int]:
    """The iterations after another look, and the bytes that the look read."""
    before = log.read_bytes
    log.look(log.path)
    return [one["iteration"] for one in log.lines], log.read_bytes - before


def test_a_look_reads_what_is_new_and_the_line_before_it(file):
    log = MetricsLog(file.path)
    one = len(json.dumps(line(10))) + 1
    assert seen(log) == (list(range(50)), file.path.stat().st_size)
    assert seen(log) == (list(range(50)), one)
    file.append(line(50))
    file.append(line(51))
    assert seen(log) == (list(range(52)), 3 * one)


def test_a_line_that_is_half_written_waits(file):
    log = MetricsLog(file.path)
    seen(log)
    text = json.dumps(line(50)).encode()
    with file.path.open("ab") as out:
        out.write(text[:20])
    assert seen(log)[0] == list(range(50)) and log.problems == []
    with file.path.open("ab") as out:
        out.write(text[20:])
    # Whole but for its end: it counts, and it counts once.
    assert seen(log)[0] == list(range(51))
    with file.path.open("ab") as out:
        out.write(b"\nnonsense\n")
    assert seen(log)[0] == list(range(51))
    assert log.problems == [f"{file.path}:52: not a line of metrics"]


def test_a_run_that_was_cut_back_and_goes_on_shows_its_new_lines(file):
    log = MetricsLog(file.path)
    seen(log)
    file.keep_up_to(30)
    for iteration in range(31, 50):
        file.append(line(iteration, reward=0.75))
    # The file is as long as before, byte for byte, but for its content.
    assert seen(log)[0] == list(range(50))
    assert [one["reward/mean"] for one in log.lines][29:33] == [0.5, 0.5, 0.75, 0.75]


def test_however_a_file_changes_a_look_sees_what_a_first_one_would(file):
    log, rng = MetricsLog(file.path), random.Random(0)

    def append() -> None:
        file.append(line(rng.randrange(100), rng.random()))

    def half() -> None:
        with file.path.open("ab") as out:
            out.write(json.dumps(line(rng.randrange(100))).encode()[: rng.randrange(240)])

    def end() -> None:
        with file.path.open("ab") as out:
            out.write(b"\n")

    def cut() -> None:
        os.truncate(file.path, rng.randrange(file.path.stat().st_size + 1))

    def resume() -> None:
        file.path.write_bytes(file.path.read_bytes().rpartition(b"\n")[0] + b"\n")
        lines = [one for one in file.read() if isinstance(one, dict)]
        file.path.write_text("".join(json.dumps(one) + "\n" for one in lines), "utf-8")
        file.keep_up_to(rng.randrange(100))

    for _ in range(300):
        for change in rng.choices([append, half, end, cut, resume], [8, 2, 2, 1, 1], k=rng.randint(1, 4)):
            change()
        log.look(file.path)
        first = MetricsLog(file.path)
        first.look(file.path)
        assert (log.lines, log.problems) == (first.lines, first.problems)


def test_a_refreshed_page_reads_only_what_no_page_has_read(tmp_path, file, state):
    app = state(tmp_path)
    run = app.run(tmp_path.name)
    run.metrics()
    before = run.files.metrics.read_bytes
    again = app.run(tmp_path.name)
    assert again is not run and len(again.metrics()[0]) == 50
    assert again.files.metrics.read_bytes - before == len(json.dumps(line(10))) + 1


def test_a_long_curve_keeps_its_spikes():
    values = [0.0] * 5000
    values[1234], values[4321], values[4999] = 9.0, -9.0, 1.0
    points = [(float(i), value) for i, value in enumerate(values)]
    drawn = figures.extremes(points, 400)
    assert len(drawn) <= 400 and drawn == sorted(drawn)
    assert {(1234.0, 9.0), (4321.0, -9.0), (4999.0, 1.0)} <= set(drawn)
    assert figures.extremes(points[:400], 400) == points[:400]
    lines = [{"iteration": i, "reward/mean": value} for i, value in enumerate(values)]
    curve = figures.metric_curve(lines, "reward/mean", "reward", {})
    assert list(zip(curve["x"], curve["y"], strict=True)) == drawn


def test_a_bar_with_several_warnings_has_one_sign():
    lines = [{"iteration": i, "seconds/rollout": 1.0} for i in range(1, 1001)]
    warned = [Warned(i, f"warning {i}") for i in (2, 5, 8, 500)]
    *_, signs = health_views.stages_figure(lines, warned)["data"]
    # A bar stands for nine iterations: 1 to 9, and 496 to 504.
    assert signs["text"] == ["iteration 2: warning 2, and 2 more warnings", "iteration 500: warning 500"]
    assert signs["x"] == [2, 500]


def test_the_prompts_recorded_most_often_are_offered(tmp_path, monkeypatch, state):
    for iteration, prompts in enumerate(("abc", "ab", "cb")):
        write_traces(tmp_path / "one" / "traces", iteration, [make_trace(prompt_id=name) for name in prompts])
    monkeypatch.setattr(run_tab, "MOST_PROMPTS", 2)
    with gr.Blocks():
        tab, session = run_tab.RunTab(state(tmp_path / "one"), gr.State()), Session()
    tab.go(session, Place("one"))
    box = tab.index(session)[tab.prompt]
    assert [name for _, name in box.choices] == ["eval: a", "eval: b"]
    assert box.label == "Prompt: the 2 recorded most often, of 3"


def test_curves_are_drawn_for_who_unfolds_them(tmp_path, file, state):
    with gr.Blocks():
        tab, session = run_tab.RunTab(state(tmp_path), gr.State()), Session()
    assert tab.go(session, Place(tmp_path.name))[tab.curves] == ""
    assert "hapo-figure" in tab.unfold(run_tab.CURVES)(session)[tab.curves]
    file.append(line(77))
    assert "77" in tab.follow(session)[tab.curves]
