"""Signs of life: the numbers of a stage by a clock that stands still, and what is shown of them."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from hapo_lite.records import Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.display import FIRST_S, INTERVAL_S, Display
from hapo_lite.runs.progress import Counting, Progress, Writing, in_words
from hapo_lite.runs.status import BLOCK, Doing, Status, read_status
from hapo_lite.tasks.verify import GraderPool
from tests.conftest import ROOT, TINY


class Clock:
    """Seconds, which pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ------------------------------------------------------------------------------------------------------- the numbers


def steps(writing: Writing, clock: Clock, running: list[int]) -> None:
    """A step of 0.1 s for each number of rows that go on after it."""
    for rows in running:
        clock.now += 0.1
        writing.wrote(rows)


def test_while_nothing_has_finished_the_time_left_is_a_bound(clock):
    """Two parts of 4 completions of at most 100 tokens: 79 + 100 steps of 0.1 s, and 2.1 s of reading the prompts."""
    writing = Writing(8, limit=100, clock=clock)
    writing.part(4, rows=4)
    clock.now += 2.0
    assert writing.numbers().seconds_left is None
    steps(writing, clock, [4] * 21)
    found = writing.numbers()
    assert (found.done, found.total, found.tokens, found.rows, found.at_most) == (0, 8, 84, 4, True)
    assert found.seconds_left == pytest.approx(7.9 + 2.1 + 10.0)
    assert found.tokens_per_second == pytest.approx(84 / 4.1)


def test_from_what_has_finished_the_longest_of_the_others_is_expected(clock):
    """29 tokens and 2 of 4 finished: 14.5 tokens each, and 14.5 (1 + 1/2) steps for the longer of the two others."""
    writing = Writing(4, limit=100, clock=clock)
    writing.part(4, rows=4)
    steps(writing, clock, [4, 4, 4, 4, 3, 2, 2, 2, 2])
    found = writing.numbers()
    assert (found.done, found.tokens, found.rows, found.at_most) == (2, 5 * 4 + 3 + 3 * 2, 2, False)
    assert found.seconds_left == pytest.approx(29 / 2 * 1.5 * 0.1)


def test_no_completion_is_expected_to_be_longer_than_the_limit(clock):
    writing = Writing(4, limit=12, clock=clock)
    writing.part(4, rows=4)
    steps(writing, clock, [4] * 9 + [3])
    assert writing.numbers().seconds_left == pytest.approx(2 * 0.1)


def test_later_parts_are_expected_to_take_what_the_first_one_took(clock):
    writing = Writing(12, limit=100, clock=clock)
    writing.part(4, rows=4)
    steps(writing, clock, [4] * 49 + [0])
    writing.part_ended(tokens=200)
    writing.part(4, rows=4)
    clock.now += 1.0
    assert writing.numbers().seconds_left == pytest.approx(5.0 - 1.0 + 5.0)  # before the first step of the part
    steps(writing, clock, [4, 4])
    # 52 tokens each, and 52 (1 + 1/2 + 1/3 + 1/4) for the longest, which exceeds the limit.
    assert writing.numbers().seconds_left == pytest.approx((100 - 2) * 0.1 + 5.0)


def test_steps_that_are_reported_eight_at_a_time_are_the_same_steps(clock):
    writing = Writing(4, limit=80, clock=clock)
    writing.part(4, rows=4)
    for _ in range(3):
        clock.now += 0.8
        writing.wrote(4, steps=8)
    assert writing.numbers().tokens == 96
    assert writing.numbers().seconds_left == pytest.approx((80 - 24) * 0.1)


def test_with_rows_that_are_refilled_the_pace_of_tokens_counts(clock):
    writing = Writing(40, limit=100, refills=True, clock=clock)
    writing.part(40, rows=4)
    clock.now += 1.0
    writing.drew(4)
    assert writing.numbers().seconds_left == pytest.approx((40 * 100 - 4) / 4)
    for _ in range(99):
        clock.now += 1.0
        writing.drew(4)
    writing.finished(20)
    # 20 tokens each; of a mean of 20 hardly one reaches the limit of 100: 20 (1 - e^-5).
    assert writing.numbers().seconds_left == pytest.approx(20 * 20 * (1 - 2.718281828**-5) / 4)
    writing.part_ended(tokens=390)
    assert (writing.numbers().done, writing.numbers().tokens, writing.numbers().seconds_left) == (40, 390, None)


def test_the_time_left_of_counted_work_goes_by_its_padded_tokens(clock):
    counting = Counting(3, "micro-batches", size=1000, clock=clock)
    assert counting.numbers().seconds_left is None
    clock.now += 8.0
    counting.advance(1, 800)
    assert counting.numbers().seconds_left == pytest.approx(2.0)
    clock.now += 1.5
    found = counting.numbers()
    assert (found.seconds_left, found.tokens_per_second) == (pytest.approx(0.5), pytest.approx(100.0))
    clock.now += 9.0
    assert counting.numbers().seconds_left == 0.0
    counting.advance(5, 900)  # once more after a shortage of memory
    assert counting.numbers().done == 3


def test_a_stage_in_words(clock):
    progress = Progress(clock=clock)
    with progress.within("loading a model"):
        clock.now += 42
        assert str(progress) == "starting, loading a model: 42 s so far"
    progress.enter("rollout")
    writing = progress.write(8, 1000)
    writing.part(4, 4)
    with progress.within("9 of 16 groups kept"):
        steps(writing, clock, [4, 4])
        assert str(progress) == (
            "rollout, 9 of 16 groups kept: 0/8 completions, at most 3 min left, 40 tokens/s, 8 tokens, 4 rows left"
        )
    progress.enter("grading")
    progress.count(4, "answers")
    assert str(progress) == "grading: 0/4 answers, 0 s so far"
    clock.now += 3
    progress.advance(3)
    assert str(progress) == "grading: 3/4 answers, 1 s left"


def test_durations_in_words():
    assert [in_words(s) for s in (5, 89, 90, 3600, 5400, 12_060, 200_000)] == [
        "5 s",
        "89 s",
        "2 min",
        "60 min",
        "1 h 30 min",
        "3 h 21 min",
        "2 d 8 h",
    ]


# -------------------------------------------------------------------------------------------------- who reports them


@pytest.mark.parametrize("engine", ["transformers", "paged"])
def test_what_an_engine_reports_is_what_it_writes(make_recipe, make_loop, monkeypatch, engine):
    """Counted step by step, before the completions are there to be counted."""
    recipe = make_recipe(f"rollout.engine={engine}", "rollout.batch_size=6")
    collector = (loop := make_loop(recipe)).collector
    counted = []
    monkeypatch.setattr(Writing, "part_ended", lambda self, tokens: counted.append((self.tokens, tokens)))
    requests = [Request(prompt, sample) for prompt in loop.stream.take(0, 3) for sample in range(4)]
    collector.engine.sample(requests, AdaptiveTemperature(None, 1.0), DrawKey(0, Stage.TRAINING, 1))
    assert [seen for seen, _ in counted] == list(itertools.accumulate(tokens for _, tokens in counted))
    assert counted[-1][0] > 12 == collector.engine.writing.total
    assert collector.engine.writing is collector.progress.work


def test_every_stage_counts_all_of_its_work(make_recipe, make_loop):
    loop = make_loop(make_recipe("training.micro_batch_tokens=128"))
    ended = {}

    def entered(stage):
        ended[loop.resources.progress.stage] = loop.resources.progress.numbers()

    loop.resources.progress.entered = entered
    loop.step(TrainState())
    entered("")
    assert ended["rollout"].done == ended["rollout"].total == 16 == ended["grading"].total
    assert ended["grading"].done == 16
    for stage in ("scoring", "update"):
        found = ended[stage]
        assert found.done == found.total > 1 and found.unit == "micro-batches"
        assert found.tokens == loop.resources.progress.work.size if stage == "update" else found.tokens > 0
        assert found.seconds_left == 0.0


def test_every_answer_is_counted_whether_it_is_plain_compared_or_the_same_as_another():
    told = []
    pairs = [(r"\boxed{2}", "2"), (r"\boxed{x+\frac{1}{2}}", "0.5+x"), (r"\boxed{y^2}", "y*y")]
    with GraderPool(workers=1) as pool:
        grades = pool.grade_many([pairs[0], pairs[1], pairs[1], pairs[2]], graded=told.append)
    assert all(grade.correct for grade in grades)
    assert sorted(told) == [1, 1, 2]


# ----------------------------------------------------------------------------------------------------- what is shown


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


# ------------------------------------------------------------------------------------------------------- status.json


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


# ----------------------------------------------------------------------------------------------------- whole runs

SMALL = [
    "rollout.prompts_per_iteration=4",
    "rollout.completions_per_prompt=8",
    "rollout.batch_size=4",  # eight parts, so that a rollout lasts
    "training.iterations=2",
    "evaluation.prompts=4",
    "evaluation.samples=2",
    "reward.workers=1",
]
FASTER = """
import sys
from hapo_lite import display
display.TICK_S, display.INTERVAL_S, display.FIRST_S = {tick}, {interval}, {first}
from hapo_lite.cli import run_command
from hapo_lite.train import main
sys.exit(run_command(main))
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}


def command(folder, *overrides: str, tick: float = 0.01, interval: float = 0.2, first: float = 0.1) -> list[str]:
    code = FASTER.format(tick=tick, interval=interval, first=first)
    return [sys.executable, "-c", code, str(TINY), f"output_dir={folder}", *SMALL, *overrides]


@pytest.fixture(scope="module")
def silent(tmp_path_factory) -> tuple[list[Doing], str, str]:
    """A run with logging.progress=false: what status.json said during its rollouts, and what the run printed."""
    folder = tmp_path_factory.mktemp("silent")
    whole = command(folder, "logging.progress=false")
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(whole, stdout=out, stderr=err, env=ENVIRONMENT, cwd=ROOT)
    seen = []
    while process.poll() is None:
        doing = read_status(folder / "tiny_cpu" / "status.json")
        if doing is not None and doing.stage == "rollout" and doing.progress:
            seen.append(doing)
        time.sleep(0.005)
    assert process.returncode == 0, (folder / "err").read_text()
    return seen, (folder / "out").read_text(), (folder / "err").read_text()


def test_status_json_tells_how_far_a_rollout_is(silent):
    seen, _, shown = silent
    assert shown == ""
    assert len({(d.iteration, d.progress["done"], d.progress["tokens"]) for d in seen}) > 3
    assert {d.progress["total"] for d in seen} == {32}
    assert any(0 < d.progress["done"] < 32 and d.progress["seconds_left"] is not None for d in seen)


def test_on_a_pipe_there_are_whole_lines(silent, tmp_path):
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    line = re.compile(r"(iteration \d, )?[a-z ]+[:,] .*")
    # The bar is overwritten in place, and a line begins where it was.
    shown = [text for text in re.split(r"[\r\n]+", done.stderr) if text.strip()]
    found = [text for text in shown if line.fullmatch(text)]
    assert len(found) >= 3 and any("completions" in text for text in found)
    assert any(text.startswith("iteration ") for text in found)
    assert [text for text in shown if not line.fullmatch(text) and "%|" not in text] == []
    assert not [text for text in found if "|" in text]
    assert [same for same in done.stdout.splitlines() if "held-out" in same] == [
        same for same in silent[1].splitlines() if "held-out" in same
    ]


COLUMNS = 50
"""Fewer than many a line has."""


def on_a_terminal(whole: list[str]) -> tuple[int, str]:
    """Run under a pseudo-terminal of COLUMNS columns: the exit code, and all that was written to it."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        time.sleep(0.2)  # the size is set first
        os.execve(whole[0], whole, ENVIRONMENT)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    written = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break
        if not chunk:
            break
        written += chunk
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), written.decode()


def screen(written: str) -> list[str]:
    """What is left on a terminal that knows carriage returns and nothing else: a line is overwritten in place."""
    left = []
    for line in written.split("\n"):
        cells: list[str] = []
        for drawn in line.split("\r"):
            cells[: len(drawn)] = drawn
        left.append("".join(cells).rstrip())
    return left


def test_on_a_terminal_one_line_changes_and_all_that_is_printed_stays_whole(silent, tmp_path):
    code, written = on_a_terminal(command(tmp_path))
    assert code == 0, written
    assert "\x1b" not in written  # the cursor never moves up, which the output of a notebook's cell could not
    drawn = re.split(r"[\r\n]+", written)
    assert any(re.match(r"starting, (loading|reading) tiny.*so far", text) for text in drawn)
    assert any(re.match(r"\d/2 \[\d\d:\d\d<.*\] rollout: \d+/32 completions, ", text) for text in drawn)
    assert all(len(text) <= COLUMNS for text in drawn if re.match(r"\d/2 \[|starting|engine check|closing", text))
    left = screen(written)
    # The bar at its end, and what a run prints, each on a line of its own; of the changing line, nothing.
    assert any(re.match(r"100%\|█+\| 2/2 \[", line) for line in left)
    kept = ("tiny_cpu:", "note:", "rollout.engine")
    same = [line for line in silent[1].splitlines() if "held-out" in line or line.startswith(kept)]
    assert len(same) >= 5 and not [line for line in same if line.rstrip() not in left]
    assert not [line for line in left if re.search(r"so far|completions, |micro-batches|\] closing", line)]


def test_an_error_on_a_terminal_is_a_line_of_its_own(tmp_path):
    code, written = on_a_terminal(command(tmp_path, "data.max_prompt_tokens=3"))
    assert code == 2
    assert any(line.startswith("error: every prompt is longer") for line in screen(written))
