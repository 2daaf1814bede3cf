"""What is shown of a stage, by a clock that stands still: lines, and the numbers of status.json."""

from __future__ import annotations

import json

import pytest

from hapo_lite.runs.display import FIRST_S, INTERVAL_S, Display
from hapo_lite.runs.progress import Progress
from hapo_lite.runs.status import BLOCK, Status, read_status
from tests.clock import steps


@pytest.fixture
def display(clock):
    return Display(Progress(clock=clock), Status(None), main=True, shown=True)


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_short_run_prints_no_line_and_a_long_stage_one_a_minute(display, clock, capsys):
    progress = display.progress
    for _ in range(14):  # a minute in which no stage lasts
        progress.enter("rollout")
        clock.now += 4
        display.tick()
    assert lines(capsys) == []
    display.status.doing.iteration = 3
    clock.now += INTERVAL_S
    display.tick()
    assert lines(capsys) == ["iteration 3, rollout: 64 s so far"]
    for _ in range(59):
        clock.now += 1
        display.tick()
    assert lines(capsys) == []
    clock.now += 1
    display.tick()
    assert lines(capsys) == ["iteration 3, rollout: 2 min so far"]


def test_the_first_line_comes_after_seconds(display, clock, capsys):
    clock.now += FIRST_S - 0.1
    display.tick()
    assert lines(capsys) == []
    clock.now += 0.1
    display.tick()
    display.tick()
    assert lines(capsys) == ["starting: 10 s so far"]


@pytest.mark.parametrize(("main", "shown"), [(True, False), (False, True)])
def test_no_line_where_none_is_wanted_and_none_of_another_process(clock, capsys, main, shown):
    display = Display(Progress(clock=clock), Status(None), main, shown)
    with display.announcing("{}"):
        display.progress.write(2, 100).part(2, 2)
        clock.now += 1000
        display.progress.work.wrote(2)
        clock.now += 1000
        display.progress.work.wrote(2)
        display.tick()
    display.say("said")
    assert capsys.readouterr() == ("said\n" if main else "", "")


def test_how_long_the_first_evaluation_takes_is_said_once_when_it_is_known(display, clock, capsys):
    """64 completions in parts of 32, at most 1,000 tokens, 0.1 s a step: 200 s at most."""
    writing = display.progress.write(64, 1000)
    with display.announcing("first evaluation: 64 completions, {}"):
        writing.part(32, 32)
        steps(writing, clock, [32] * 290)
        display.tick()
        assert "first evaluation" not in capsys.readouterr().out
        steps(writing, clock, [32] * 20)
        display.tick()
        display.tick()
        assert capsys.readouterr().out == "first evaluation: 64 completions, at most 3 min\n"


def test_a_short_first_evaluation_is_not_announced(display, clock, capsys):
    writing = display.progress.write(32, 500)
    with display.announcing("{}"):
        writing.part(32, 32)
        for _ in range(49):
            steps(writing, clock, [32] * 10)
            display.tick()
    assert capsys.readouterr().out == ""


def test_the_record_has_the_numbers_and_is_whole_after_a_longer_one(tmp_path, clock):
    path = tmp_path / "status.json"
    with Status(path) as status:
        display = Display(Progress(status.enter, clock), status, main=True, shown=False)
        display.progress.enter("rollout")
        writing = display.progress.write(8, 100)
        writing.part(4, 4)
        steps(writing, clock, [4, 4, 3])
        with display.progress.within("x" * 2 * BLOCK):
            display.tick()
        assert path.stat().st_size > 2 * BLOCK
        doing = read_status(path)
        assert doing.stage == "rollout" and doing.about == "x" * 2 * BLOCK
        assert doing.progress == {
            "done": 1,
            "total": 8,
            "unit": "completions",
            "tokens": 12,
            "tokens_per_second": 40.0,
            "rows": 3,
            "seconds_left": round(12 * (1 + 1 / 2 + 1 / 3) * 0.1 + 0.1 + 12 * (25 / 12) * 0.1, 1),
            "at_most": False,
        }
        display.progress.enter("grading")
        json.loads(path.read_text())
        assert read_status(path).progress is None and read_status(path).about == ""
        status.note("rollout", "late", None)  # by a display that has not seen the new stage
        assert read_status(path).about == ""
    assert read_status(path).stage == "finished"
