"""What a model can write to hang, kill, fool or escape the grader: tests/hostile_answers.jsonl, an answer a line.

Each line has a name, the completion in pieces (text, or [text, how often]), the gold answer, and the outcomes that are
right. `timeout` is among them wherever a process has to decide, since the deadline here is short.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hapo_lite.tasks.verify import LONGEST_ANSWER, Grade, GraderPool
from tests.conftest import ROOT
from tests.graders import box, children

LINES = Path(__file__).with_name("hostile_answers.jsonl").read_text(encoding="utf-8").splitlines()
ANSWERS = [json.loads(line) for line in LINES]
DEADLINE_S = 0.5
SLACK_S = 1.0
"""For the search in a megabyte of text, and for a machine that does other things as well."""
PLAIN = (box("1+x"), "x+1")


def completion(answer: dict) -> str:
    return "".join(piece if isinstance(piece, str) else piece[0] * piece[1] for piece in answer["completion"])


def graded(answers: list[dict]) -> list[tuple[Grade, float]]:
    """Grades in a pool of one process, each with its seconds. The process is there before the clock starts."""
    out = []
    with GraderPool(workers=1, timeout_s=DEADLINE_S) as pool:
        for answer in answers:
            assert pool.grade_many([PLAIN], timeout_s=20)[0].correct  # also: whatever came before, it grades again
            started = time.perf_counter()
            [grade] = pool.grade_many([(completion(answer), answer["gold"])])
            out.append((grade, time.perf_counter() - started))
    return out


def was_late(answer: dict, grade: Grade, seconds: float) -> bool:
    return seconds > DEADLINE_S + SLACK_S or (grade.outcome == "timeout" and "timeout" not in answer["allowed"])


def test_hostile_answers_fool_nobody_and_hold_nobody_up(tmp_path, monkeypatch):
    assert len(ANSWERS) >= 60 and len({answer["name"] for answer in ANSWERS}) == len(ANSWERS)
    monkeypatch.chdir(tmp_path)
    before = children()
    with ThreadPoolExecutor(4) as threads:
        quarters = [ANSWERS[i::4] for i in range(4)]
        found = zip(quarters, threads.map(graded, quarters), strict=True)
        verdicts = {answer["name"]: one for quarter, many in found for answer, one in zip(quarter, many, strict=True)}
    # A machine with other work may hold up any answer once: one that was late is given a second time, alone.
    late = [answer for answer in ANSWERS if was_late(answer, *verdicts[answer["name"]])]
    verdicts |= {answer["name"]: one for answer, one in zip(late, graded(late), strict=True)}
    allowed = {answer["name"]: answer["allowed"] for answer in ANSWERS}
    assert {n: (g, allowed[n]) for n, (g, _) in verdicts.items() if g.outcome not in allowed[n]} == {}
    assert {n: s for n, (_, s) in verdicts.items() if s > DEADLINE_S + SLACK_S} == {}
    assert all(g.answer is None or len(g.answer) <= LONGEST_ANSWER for g, _ in verdicts.values())
    assert children() <= before
    assert list(tmp_path.iterdir()) == []  # some of them try to leave a file


def test_a_memory_bomb_meets_its_limit_and_the_process_is_replaced():
    with GraderPool(workers=1, timeout_s=60) as pool:
        pool.grade_many([PLAIN])
        worker = pool._idle[0].process.pid
        assert 0 < resource.prlimit(worker, resource.RLIMIT_AS)[0] <= 1 << 30
        # Lower still, so that the bomb meets it in a second or two.
        resource.prlimit(worker, resource.RLIMIT_AS, (150 << 20, 150 << 20))
        started = time.perf_counter()
        [grade] = pool.grade_many([(box(r"2^{99999999999}"), "x")])
        assert grade.outcome in ("wrong", "error") and time.perf_counter() - started < 30
        assert pool.grade_many([PLAIN])[0].correct


@pytest.mark.parametrize(
    "attempt",
    [
        "os.system('touch owned')",
        "os.posix_spawn('/bin/sh', ['sh', '-c', 'touch owned'], {})",
        "os.fork()",
        "subprocess.run(['touch', 'owned'])",
        "socket.create_connection(('127.0.0.1', 9), 1)",
        "open('owned', 'w')",
        "os.open('owned', os.O_CREAT)",
        "os.remove(__file__)",
        "os.kill(os.getppid(), 9)",
    ],
)
def test_code_in_a_grading_process_gets_nowhere(tmp_path, attempt):
    # Arithmetic in running text is computed by Python. Should a text ever reach further than that, this is the fence.
    program = (
        "import os, socket, subprocess\n"
        "from hapo_lite.tasks import _grader\n"
        "_grader.confine()\n"
        "__file__ = _grader.__file__\n"
        f"try: {attempt}\n"
        "except PermissionError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.startswith("a grading process does nothing like "), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pool_outlives_the_thread_that_first_used_it():
    with GraderPool(workers=1, timeout_s=20) as pool:
        thread = threading.Thread(target=pool.grade_many, args=([PLAIN],))
        thread.start()
        thread.join()
        process = pool._idle[0].process
        assert pool.grade_many([PLAIN])[0].correct and pool._idle[0].process is process
