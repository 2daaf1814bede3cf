"""What whole runs show of themselves: in status.json, on a pipe, and on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from hapo_lite.runs.status import Doing, read_status
from tests.conftest import ROOT, TINY

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
from hapo_lite.runs import display
display.TICK_S, display.INTERVAL_S, display.FIRST_S = {tick}, {interval}, {first}
from hapo_lite.cli import run_command
from hapo_lite.train.__main__ import main
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
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(whole, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, **ends)
    os.close(terminal)
    written = b""
    # Linux ends it with an error where macOS gives nothing more.
    with contextlib.suppress(OSError):
        while chunk := os.read(ours, 65536):
            written += chunk
    os.close(ours)
    return process.wait(), written.decode()


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
