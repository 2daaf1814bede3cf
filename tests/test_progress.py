"""How far a stage is, by a clock that stands still, and who reports it."""

from __future__ import annotations

import itertools

import pytest

from hapo_lite.records import Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.progress import Counting, Progress, Writing, in_words
from hapo_lite.tasks.verify import GraderPool
from tests.clock import steps


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
