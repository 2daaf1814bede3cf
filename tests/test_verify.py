"""Grading: what counts as right, what hostile text can do, and what becomes of the grading processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import grading
from hapo_lite.errors import UserError
from hapo_lite.tasks.verify import LONGEST_ANSWER, Grade, GraderPool, boxed_answer, grade
from tests.graders import box, children

DATA = Path(__file__).parents[2] / "shared" / "data"
ENDLESS = r"\boxed{10^{10^{10}}}"


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=20) as pool:
        yield pool


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def seconds_of_cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "42"),
        ("042", "42"),
        ("42.0", "42"),
        ("42.", "42"),
        ("+42", "42"),
        ("−42", "-42"),
        ("1,000", "1000"),
        (r"2\,000", "2000"),
        (r"11,\! 111,\! 100", "11111100"),
        (r"\$18.90", "18.9"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        ("17000", "1.70e4"),
        (r"3.3\times 10^{-10}", "3.3e-10"),
        ("0.333333", r"\frac{1}{3}"),
        (r"x = 42", "42"),
        (r"6 \cdot 7 = 42", "42"),
        (r"2^{10}", "1024"),
        (r"42\text{ cm}", "42"),
        (r"50\%", "50"),
        (r"(3,\pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}"),
        ("q+p", "p + q"),
        ("60, 90", r"$90^{\circ}$,$60^{\circ}$"),
        ("East", r"\text{east}"),
        (r"\text{East}", "east"),
        (r"-\frac{dx}{dt} = a - kx", r"\frac{dx}{dt} = kx - a"),
        (r"864 \text{ inches}^2", r"864 \mbox{ inches}^2"),
        ("a", "(A)"),
        (r"\text{(A)}", "A"),
        ("４２", "42"),
        ("٤٢", "42"),
    ],
)
def test_equal_answers_however_written(pool, answer, gold):
    assert pool.grade_many([(box(answer), gold)]) == [Grade(True, answer, "correct")]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("4", "42"),
        ("-42", "42"),
        ("4 2", "42"),
        ("4²", "42"),
        ("4\x002", "42"),
        ("4_2", "42"),
        ("42!", "42"),
        ("1,2", "1.2"),
        ("1, 000", "1000"),
        ("41, 42", "42"),
        (r"41 \text{ or } 42", "42"),
        ("x=3, y=42", "42"),
        (r"\pm 42", "42"),
        ("12+3*4", "24"),
        (r"\binom{6}{2}", "15"),
        ("0.33", r"\frac{1}{3}"),
        (r"not @ \frac{1}{2} &", "0.5"),
        ("0.0", r"3.3 \times 10^{-10}"),
        ("0.0", r"\frac{\pi}{10^{20}}"),
        (r"1.9 \times 10^{-27} \pi", r"1.325 \times 10^{-27} \pi"),
        ("12_9", "12_8"),
        (r"-\frac{dx}{dt} = kx - a", r"\frac{dx}{dt} = kx - a"),
        (r"2\frac{dx}{dt} = kx - a", r"\frac{dx}{dt} = kx - a"),
        (r"864 \mbox{ inches}^3", r"864 \mbox{ inches}^2"),
        (r"6.4 \times 10^{16} \text{ cm}^{-4}", r"6.4 \times 10^{16} \text{ cm}^{-3}"),
        ("(2,1)", "(1,2)"),
        (r"\{0,5\}", "(0,5)"),
        (r"(-\infty,-5]", r"(-\infty,-5)"),
        ("seat", "east"),
        ("M", "m"),
        ("b", "(A)"),
        ("1/0", "0"),
        ("42", ""),
        ('__import__("os").getpid()', "42"),
    ],
)
def test_wrong_answers_stay_wrong(pool, answer, gold):
    assert [g.outcome for g in pool.grade_many([(box(answer), gold)])] == ["wrong"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{2}, boxed as in \boxed{}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\fbox{2}", "2"),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"}} \boxed{2} {{", "2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{2", None),
        ("2", None),
    ],
)
def test_the_last_complete_box_counts(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "Step 1.\nAnswer: 42",
        "**Answer:** $42$",
        "Answer:\n\\[\n42\n\\]",
        "The final answer is $42$. I hope it is correct.",
        "So the answer is 42.",
        "She ends up with 6 * 7 = 42 apples.\n#### 42",
        "The answer is 42 apples.",
        "The answer is 41. No, the answer is 42.",
        "Hence $x = 42$.",
    ],
)
def test_answers_without_a_box(pool, text):
    assert pool.grade_many([(text, "42")])[0].outcome == "correct"


@pytest.mark.parametrize("text", ["", "I cannot tell.", r"The answer is 42, so \boxed{4", r"\boxed{}"])
def test_no_answer_is_unparseable(pool, text):
    assert pool.grade_many([(text, "4")]) == [Grade(False, None, "unparseable")]


def test_copying_the_problem_is_no_answer_in_running_text_either(pool):
    texts = ["12+3*4=?  12+3*4", "The answer is 12 + 3*4.", "The answer is 12 + 3*4 apples."]
    assert [g.correct for g in pool.grade_many([(text, "24") for text in texts])] == [False] * 3


def test_a_term_of_something_longer_is_no_answer(pool):
    """Written by the bundled model about an AMC problem, and once taken for an answer of 2."""
    texts = ["Take 2*14}}}}}}}}}}}}}}", "Hence 7*2}}}", "So 6 / 3 = 2", "Hence $x = 2$ - done."]
    assert [g.correct for g in pool.grade_many([(text, "2") for text in texts])] == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "gold", "outcome"),
    [
        ("The answer is $f(x)=ax$, where $a$ is odd.", "$f(x)=ax$, where $a$ is odd", "correct"),
        ("The answer is $f(x)=ax$, where $a$ is even.", "$f(x)=ax$, where $a$ is odd", "wrong"),
        ("The answer is $221,$8$.", "$221,$8$", "correct"),
        ("The answer is $221,$7$.", "$221,$8$", "wrong"),
        ("The answer is $42$, where 42 is even.", "42", "correct"),
    ],
)
def test_words_after_the_formula(pool, text, gold, outcome):
    assert [g.outcome for g in pool.grade_many([(text, gold)])] == [outcome]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the checkout")
@pytest.mark.parametrize("name", grading.SUITES)
def test_every_gold_answer_equals_itself_and_no_near_miss_does(pool, name):
    import pyarrow.parquet as pq

    golds = pq.read_table(DATA / f"{name}.parquet")["answer"].to_pylist()
    for form in (grading.boxed, grading.sentence):
        grades = pool.grade_many([(form(gold), gold) for gold in golds])
        assert [gold for gold, g in zip(golds, grades, strict=True) if not g.correct] == []
    # A twentieth of them: benchmarks/grading.py does all.
    wrong = grading.near_misses(golds)[::20]
    grades = pool.grade_many([(box(answer), gold) for answer, gold in wrong])
    assert len(wrong) > 40 and [pair for pair, g in zip(wrong, grades, strict=True) if g.correct] == []


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the checkout")
def test_math_verify_reads_the_gold_answers(pool):
    import pyarrow.parquet as pq

    golds = pq.read_table(DATA / "math500.parquet")["answer"].to_pylist()[::10]
    # Multiplied out, so that nothing is settled by comparing text.
    formulas = [gold for gold in golds if not gold.isalnum() and "=" not in gold and "text" not in gold]
    grades = pool.grade_many([(box(rf"1 \cdot ({gold})"), rf"({gold}) + 0") for gold in formulas])
    assert sum(g.correct for g in grades) > 0.6 * len(formulas)


def test_short_numbers_need_no_process():
    with GraderPool(workers=1) as pool:
        pairs = [(box(str(i)), str(i + i % 2)) for i in range(128)]
        grades = pool.grade_many(pairs)
        assert [g.correct for g in grades] == [i % 2 == 0 for i in range(128)]
        assert not pool._idle


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["\\boxed{", "{", "}", "\\", "$", "42", " ", "\n", "Answer:", "####", "\0", "\ud800"])
    ).map("".join)
)
def test_any_text_can_be_searched(text):
    answer = boxed_answer(text)
    assert answer is None or (answer in text and answer.strip())


def test_a_text_that_cannot_be_read_is_an_error_and_the_rest_is_graded(monkeypatch):
    def reads(text, gold):
        return Grade(True, text, "correct") if text else {}["no answer"]

    monkeypatch.setattr("hapo_lite.tasks.answers.read", reads)
    with GraderPool(workers=1) as pool:
        grades = pool.grade_many([("", "42"), ("42", "42")])
    assert grades == [Grade(False, None, "error"), Grade(True, "42", "correct")]


def test_a_process_that_is_late_is_not_blamed_on_a_missing_package(monkeypatch):
    monkeypatch.setattr("hapo_lite.tasks.grader._STARTING_S", 0.0)
    with GraderPool(workers=1) as pool, pytest.raises(UserError, match="not ready after 0 seconds: run the") as error:
        pool.grade_many([(box("(x+1)^2"), "x^2+2x+1")])
    assert "math-verify" not in str(error.value)


def test_numbers_too_long_for_int_are_compared():
    digits = "9" * (LONGEST_ANSWER - 10)
    assert grade(box(digits), digits).correct
    assert not grade(box(digits), digits[:-1], timeout_s=10).correct


def test_order_is_kept_when_some_time_out():
    with GraderPool(workers=2, timeout_s=0.8) as pool:
        pool.grade_many([(box("x+1"), "y")] * 2)
        pairs = [(ENDLESS if i % 3 == 0 else box(f"{i % 2}+x"), f"x+1+0*{i}") for i in range(6)]
        grades = pool.grade_many(pairs)
    assert [g.outcome for g in grades] == ["timeout", "correct", "wrong", "timeout", "wrong", "correct"]
    assert grades[0].answer == "10^{10^{10}}"


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_killed_process_is_replaced(pause):
    with GraderPool(workers=1, timeout_s=20) as pool:
        assert pool.grade_many([(box("1+x"), "x+1")])[0].correct
        os.kill(pool._idle[0].process.pid, signal.SIGKILL)
        time.sleep(pause)
        assert pool.grade_many([(box("2+x"), "x+2")])[0].correct


def test_a_process_that_keeps_dying_at_work_is_an_error_and_the_rest_is_graded():
    done = threading.Event()

    def kill_what_computes_long() -> None:
        while not done.wait(0.1):
            for pid in children():
                if seconds_of_cpu(pid) > 2:
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_what_computes_long)
    killer.start()
    try:
        with GraderPool(workers=1, timeout_s=60) as pool:
            grades = pool.grade_many([(ENDLESS, "x+1"), (box("2+x"), "x+2")])
    finally:
        done.set()
        killer.join()
    assert [g.outcome for g in grades] == ["error", "correct"]


def test_nothing_is_left_running_after_close():
    before = children()
    pool = GraderPool(workers=2, timeout_s=0.5)
    pool.grade_many([(box("1+x"), "x+1"), (ENDLESS, "x+1"), (box("2+x"), "x+2")])
    assert children() - before
    pool.close()
    assert children() <= before
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade_many([(box("1+x"), "x+1")])


def test_processes_end_with_a_parent_that_is_killed():
    # The parent is killed while one process idles and the other is deep in a comparison.
    program = (
        "from hapo_lite.tasks.verify import GraderPool\n"
        "import threading, time\n"
        "pool = GraderPool(2, 3.0)\n"
        r"pool.grade_many([(r'\boxed{1+x}', 'x+1'), (r'\boxed{2+x}', 'x+2')])" + "\n"
        "pids = [w.process.pid for w in pool._idle]\n"
        rf"threading.Thread(target=pool.grade_many, args=([(r'{ENDLESS}', 'y+5')],), daemon=True).start()" + "\n"
        "time.sleep(0.3)\n"
        "print(*pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_grading_works_from_any_thread():
    verdicts: dict[int, bool] = {}

    def work(i: int) -> None:
        verdicts[i] = grade(box(f"x+{i}"), f"{i}+x", timeout_s=20).correct

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(8), True)


def test_the_grading_process_does_not_load_torch():
    program = (
        "import sys, hapo_lite.tasks._grader as g\n"
        "g.judge({'gold': 'x+1', 'answer': '1+x'})\n"
        "print('sympy' in sys.modules, 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "False"], done.stderr
