"""The numbers of a comparison, worked by hand, and their words."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hapo_lite.compare import pace
from hapo_lite.compare.markdown import markdown
from hapo_lite.compare.numbers import Numbers, clipped_share, half_way, is_evaluated_at, run_numbers, solved_share
from hapo_lite.compare.plan import load_comparison, planned_runs
from hapo_lite.compare.report import curve_rows, difference_rows, table_rows, text_table
from hapo_lite.compare.tables import Cell, difference_table, final_table
from hapo_lite.compare.words import caveats, findings, shown, verdict
from hapo_lite.runs.lines import MetricsFile
from tests.comparisons import write_comparison

GRID = np.linspace(0.0, 100.0, 101)


def lines_of(accuracies: list[float], tokens=(0, 60, 110), entropy=(1.0, 0.5)) -> list[dict]:
    """Three lines of metrics: before training, and after two iterations."""
    return [
        {"iteration": 0, "eval/accuracy": accuracies[0], "eval/length_mean": 5.0},
        *(
            {
                "iteration": i,
                "tokens": tokens[i],
                "entropy/all_mean": entropy[i - 1],
                "length/mean": 10.0 * i,
                "clip/low_certain_share": 0.01,
                "clip/high_uncertain_share": 0.02 * i,
                "seconds/iteration": 2.0,
                "eval/accuracy": accuracies[i],
                "eval/length_mean": 5.0 + i,
                "eval/solved": [0, i - 1, 3, 4],
            }
            for i in (1, 2)
        ),
    ]


def test_a_runs_numbers_worked_by_hand():
    """Evaluations 0.2 at 0, 0.8 at 60, 0.3 at 110 tokens; the budget is 100, where the line is at 0.8 - 40/50 0.5."""
    run = run_numbers(lines_of([0.2, 0.8, 0.3]), GRID, threshold=0.5)
    # Under the line: 60 (0.2 + 0.8)/2 + 40 (0.8 + 0.4)/2 = 30 + 24, over 100 tokens.
    assert run.measures["area"] == pytest.approx(0.54, abs=1e-12)
    # 0.2 + 0.6 x/60 = 0.5 at x = 30.
    assert run.measures["to_threshold"] == pytest.approx(30.0, abs=1e-9) and run.reach == pytest.approx(30.0)
    assert (run.before, run.measures["final"], run.sampled, run.iterations) == (0.2, 0.3, 110, 2)
    # From 90 to 100 tokens the entropy goes from 1 - 30/50 0.5 = 0.7 to 0.6.
    assert run.measures["entropy"] == pytest.approx(0.65, abs=1e-12)
    # 0.03 up to 60 tokens, then a line to 0.05 at 110, which is 0.046 at 100: (60 0.03 + 40 0.038) / 100.
    assert run.measures["clipped"] == pytest.approx(0.0332, abs=1e-12)
    assert (run.measures["length"], run.measures["seconds"]) == (7.0, 4.0)
    assert run.curves["accuracy"][[0, 30, 60, 80, 100]] == pytest.approx([0.2, 0.5, 0.8, 0.6, 0.4])


def test_problems_solved_worked_by_hand():
    """Two of four problems have a right attempt at 60 tokens and three at 110, so 0.5 + 40/50 0.25 at 100."""
    run = run_numbers(
        [lines_of([0.2, 0.8, 0.3])[0] | {"eval/solved": [0, 0, 0, 1]}, *lines_of([0.2] * 3)[1:]], GRID, 0.5
    )
    assert run.measures["solved"] == 0.75
    assert run.curves["solved"][[0, 30, 60, 100]] == pytest.approx([0.25, 0.375, 0.5, 0.7])
    assert math.isnan(solved_share({"eval/accuracy": 0.5}))


def test_a_threshold_that_is_not_reached_counts_as_all_the_tokens():
    run = run_numbers(lines_of([0.2, 0.3, 0.4]), GRID, threshold=0.9)
    assert run.reach is None and run.measures["to_threshold"] == 100.0
    assert run_numbers(lines_of([0.2, 0.3, 0.4]), GRID, threshold=0.1).reach == 0.0


def test_a_run_that_ended_early_is_held_at_its_last_value_and_named(tmp_path):
    numbers = numbers_of(tmp_path, {("hapo", 0): lines_of([0.2, 0.4, 0.6], tokens=(0, 25, 50))})
    run = numbers.runs["hapo", 0]
    # 25 0.3 + 25 0.5 + 50 0.6 = 50.
    assert run.measures["area"] == pytest.approx(0.5) and run.curves["accuracy"][-1] == 0.6
    assert any("max_iterations" in s and "hapo with seed 0" in s for s in caveats(numbers))


def test_a_run_made_for_more_tokens_is_read_at_this_many():
    lines = [*lines_of([0.2, 0.4, 0.6]), {**lines_of([0.2, 0.4, 0.9])[2], "iteration": 3, "tokens": 300}]
    run = run_numbers(lines, GRID, threshold=0.5)
    assert (run.measures["final"], run.measures["seconds"], run.sampled) == (0.6, 4.0, 110)


def test_a_run_without_an_evaluation_at_the_budget_is_not_read(tmp_path):
    """Iterations end at 60 and 110 tokens. An evaluation at 110 alone is that of a budget from 61 to 110 tokens."""
    first, middle, last = lines_of([0.2, 0.4, 0.6])
    unevaluated = {key: value for key, value in middle.items() if not key.startswith("eval/")}
    lines = [first, unevaluated, last]
    assert is_evaluated_at(lines, 100.0) and not is_evaluated_at(lines, 60.0)
    assert is_evaluated_at([first, middle, last], 60.0) and is_evaluated_at(lines, 300.0)
    numbers = numbers_of(tmp_path, {("dapo", 0): lines})
    assert "Left out" not in " ".join(caveats(numbers))
    assert any("at 100: hapo with seed 3" in s for s in caveats(replace(numbers, beyond=(("hapo", 3),))))


def test_half_way_is_that_of_the_tokens_reported_on(tmp_path):
    """The reference goes from 0.2 to 0.6 at 110 tokens, the first evaluation past 100. Later ones do not count."""
    lines = [*lines_of([0.2, 0.4, 0.6]), {**lines_of([0.2, 0.4, 1.0])[2], "iteration": 3, "tokens": 300}]
    comparison = load_comparison(write_comparison(tmp_path, seeds=[0], tokens=100))
    assert half_way(comparison, {("dapo", 0): lines}) == pytest.approx(0.4)


def test_the_order_of_prompts_is_the_same_only_without_a_memory(tmp_path):
    lines = {(arm, 0): lines_of([0.2, 0.3, 0.4]) for arm in ("dapo", "hapo")}
    numbers = numbers_of(tmp_path, lines)
    assert any("same prompts in the same order" in sentence for sentence in caveats(numbers))
    assert any("follows what each arm has solved" in s for s in caveats(replace(numbers, remembers=True)))


def test_clipping_counts_every_bound():
    line = {"clip/low_certain_share": 0.25, "clip/high_uncertain_share": 0.5, "ratio/max": 9.0}
    assert clipped_share(line) == 0.75


def numbers_of(folder: Path, lines: dict[tuple[str, int], list[dict]], **changes) -> Numbers:
    seeds = sorted({seed for _, seed in lines})
    comparison = load_comparison(write_comparison(folder, seeds=seeds, tokens=100, **changes))
    return Numbers(comparison, {key: run_numbers(its, GRID, 0.5) for key, its in lines.items()}, GRID, 0.5)


def test_differences_are_paired_by_seed(tmp_path):
    """Seeds spread from 0.3 to 0.7 and hapo always 0.1 above dapo: the means overlap, the difference is sure."""
    finals = {0: 0.3, 1: 0.5, 2: 0.7}
    lines = {("dapo", s): lines_of([0.2, 0.2, f]) for s, f in finals.items()}
    lines |= {("hapo", s): lines_of([0.2, 0.2, f + 0.1]) for s, f in finals.items()}
    numbers = numbers_of(tmp_path, lines)
    found = numbers.difference("hapo", "final")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert verdict(numbers, "hapo", "final") == "better" and verdict(numbers, "hapo", "length") == ""
    table = {row["arm"]: row for row in table_rows(numbers)}
    assert table["dapo"]["final"] == pytest.approx(0.5) and table["hapo"]["final"] == pytest.approx(0.6)
    # By Student's t with two degrees of freedom: 0.5 +- 4.3027 * 0.2 / sqrt(3).
    assert (table["dapo"]["final_low"], table["dapo"]["final_high"]) == pytest.approx((0.00317, 0.99683), abs=1e-4)
    [row] = [row for row in difference_rows(numbers) if row["measure"] == "final"]
    assert (row["difference"], row["pairs"], row["excludes_zero"]) == (pytest.approx(0.1), 3, True)
    assert "By final accuracy, better than dapo: hapo (+0.100)." in findings(numbers)
    # The last evaluation, 0.1 apart, is at 110 tokens and the one before it at 60: at 100 they are 40/50 0.1 apart.
    lead = numbers.band("hapo", "accuracy", less_reference=True)
    assert lead.mean[[0, 60, 100]] == pytest.approx([0.0, 0.0, 0.08]) and lead.low == pytest.approx(lead.high)


def test_two_seeds_that_gain_the_same_problem_tell_nothing(tmp_path):
    """One of four problems more with both seeds, as happens by chance."""
    lines = {("dapo", s): lines_of([0.2, 0.2, 0.5]) for s in (0, 1)}
    more = [*lines_of([0.2, 0.2, 0.5])[:2], lines_of([0.2, 0.2, 0.5])[2] | {"eval/solved": [1, 1, 3, 4]}]
    numbers = numbers_of(tmp_path, lines | {("hapo", s): more for s in (0, 1)})
    assert numbers.difference("hapo", "solved").value == 0.25
    assert verdict(numbers, "hapo", "solved") == "better"  # as if the values had no grid
    on_a_grid = replace(numbers, steps={"solved": 0.25}, _bands={})
    assert verdict(on_a_grid, "hapo", "solved") == ""
    # To the variance 0.25^2 / 2 is added, to that of the mean half of it.
    found, lead = on_a_grid.difference("hapo", "solved"), on_a_grid.band("hapo", "solved", less_reference=True)
    assert [found.high - found.value, lead.high[-1] - lead.mean[-1]] == pytest.approx(
        [12.7062 * 0.25 / 2] * 2, abs=1e-5
    )
    # Nor is either arm's share known, which lies between 0 and 1.
    mean, band = on_a_grid.mean("hapo", "solved"), on_a_grid.band("hapo", "solved")
    assert (mean.low, mean.high, band.low[-1], band.high[-1]) == (0.0, 1.0, 0.0, 1.0)


def test_tokens_to_a_threshold_that_was_not_reached_have_no_interval(tmp_path):
    """hapo never comes up to 0.5, so how many tokens it needs is not known, nor how many more than dapo."""
    lines = {("dapo", s): lines_of([0.2, 0.6 + s / 50, 0.9]) for s in range(3)}
    lines |= {("hapo", s): lines_of([0.2, 0.3, 0.4 + s / 50]) for s in range(3)}
    numbers = numbers_of(tmp_path, lines)
    assert verdict(numbers, "hapo", "final") == "worse" and verdict(numbers, "hapo", "to_threshold") == ""
    found, mean = numbers.difference("hapo", "to_threshold"), numbers.mean("hapo", "to_threshold")
    assert found.value > 40 and mean.value == 100 and not (found.known or mean.known)
    assert numbers.mean("dapo", "to_threshold").known
    cells = dict(zip(difference_table(numbers).heads[1:], difference_table(numbers).rows[0][1], strict=True))
    assert cells["tokens to threshold"].below == ("not reached by all",)
    cells = dict(zip(final_table(numbers).heads[1:], final_table(numbers).rows[1][1], strict=True))
    assert cells["tokens to threshold"] == Cell("≥ 100", ("reached by 0 of 3",))
    rows = {row["measure"]: row for row in difference_rows(numbers)}
    assert (rows["to_threshold"]["low"], rows["to_threshold"]["excludes_zero"]) == (None, False)


def test_without_a_run_of_the_reference_there_is_no_threshold(tmp_path):
    lines = {("hapo", s): lines_of([0.2, 0.3, 0.9]) for s in range(2)}
    comparison = load_comparison(write_comparison(tmp_path, tokens=100, threshold=None))
    nowhere = half_way(comparison, lines)
    runs = {key: run_numbers(its, GRID, nowhere) for key, its in lines.items()}
    numbers = Numbers(comparison, runs, GRID, nowhere)
    table = final_table(numbers)
    cells = dict(zip(table.heads[1:], table.rows[0][1], strict=True))
    assert cells["tokens to threshold"] == Cell("-") and "not known before a run of dapo is complete" in table.caption
    assert "nan" not in markdown(numbers, 4, []).lower()


def test_one_seed_has_curves_without_ends_and_no_share_leaves_0_to_1(tmp_path):
    numbers = numbers_of(tmp_path, {("dapo", 0): lines_of([0.2, 0.2, 0.3])})
    row = next(iter(curve_rows(numbers)))
    assert (row["mean"], row["low"], row["high"]) == (0.2, None, None)
    numbers = numbers_of(tmp_path, {("dapo", s): lines_of([0.2, 0.2, f]) for s, f in enumerate([0.98, 0.99, 1.0])})
    assert numbers.mean("dapo", "final").high == 1.0 and numbers.mean("dapo", "final").low == pytest.approx(
        0.965, abs=1e-3
    )


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_pairs(tmp_path):
    lines = {("dapo", 0): lines_of([0.2, 0.2, 0.3]), ("hapo", 0): lines_of([0.2, 0.2, 0.5])}
    numbers = numbers_of(tmp_path, lines | {("hapo", 1): lines_of([0.2, 0.2, 0.9])})
    assert numbers.difference("hapo", "final").value == pytest.approx(0.2)
    assert numbers.mean("hapo", "final").value == pytest.approx(0.7)
    assert "not these means" in findings(numbers)[0]
    assert "One seed has no interval" in caveats(numbers)[0]
    [row] = [row for row in difference_rows(numbers) if row["measure"] == "final"]
    assert (row["low"], row["high"], row["excludes_zero"]) == (None, None, False)
    assert "0.300" in text_table(numbers) and "inf" not in text_table(numbers)


def test_one_seed_has_no_interval_and_nothing_is_said_of_one(tmp_path):
    lines = {("dapo", 0): lines_of([0.2, 0.2, 0.3]), ("hapo", 0): lines_of([0.2, 0.2, 0.5])}
    numbers = numbers_of(tmp_path, lines)
    assert "By final accuracy, less dapo, from one seed, which has no interval: hapo (+0.200)." in findings(numbers)
    assert text_table(numbers).endswith("\none seed has no interval: repeat with three or more")
    assert not any("no difference seen" in sentence or "not these means" in sentence for sentence in findings(numbers))


def test_marks_are_counted_and_held_against_all_comparisons_together(tmp_path):
    """Three seeds, so t = 4.303 alone and 7.649 where three comparisons are held to 95 % together.

    hapo is 0.11 +- 0.025 above dapo alone, and +- 0.044 together; archer 0.04 with the same ends, so it loses its mark;
    grpo is 0.04 +- 0.050, never marked.
    """
    gains = {"hapo": (0.10, 0.11, 0.12), "archer": (0.03, 0.04, 0.05), "grpo": (0.02, 0.04, 0.06), "dapo": (0, 0, 0)}
    lines = {(arm, s): lines_of([0.2, 0.2, 0.3 + gain]) for arm, all in gains.items() for s, gain in enumerate(all)}
    numbers = numbers_of(tmp_path, lines, arms={arm: {"method": arm} for arm in gains}, reference="dapo")
    assert [verdict(numbers, arm, "final") for arm in numbers.others] == ["better", "better", ""]
    said = caveats(numbers)[0]
    assert said.startswith(
        "3 comparisons were made in each of 6 measures; of so many equal methods about 0.15 would be marked"
    )
    assert said.endswith("what stays marked is: hapo (final accuracy), hapo (area).")
    # Every measure that the table marks is judged: with completions that are 5 tokens longer, the length too.
    for seed in range(3):
        lines["hapo", seed][-1]["eval/length_mean"] += 5.0 + seed / 1000
    said = caveats(numbers_of(tmp_path, lines, arms={arm: {"method": arm} for arm in gains}, reference="dapo"))[0]
    assert said.endswith("hapo (area), hapo (length).")


def test_a_number_that_rounds_to_nothing_has_no_sign():
    values = [(-0.0001, "+.3f"), (0.0001, "+.3f"), (-0.4, "+,.0f"), (-0.0006, "+.3f"), (float("nan"), ".3f")]
    assert [shown(*value) for value in values] == ["0.000", "0.000", "0", "-0.001", "-"]


def test_the_time_left_follows_from_the_first_runs_pace(tmp_path, monkeypatch):
    """The first tenth is seen after 30 s, start-up included, the second 20 s later: a run takes 30 + 9 x 20 s."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    runs = planned_runs(load_comparison(write_comparison(tmp_path)))
    run = runs[0]
    run.recipe.run_dir.mkdir(parents=True)
    metrics = MetricsFile(run.recipe.run_dir / "metrics.jsonl")
    watch = pace.Pace(runs, complete=(), workers=1)
    watch.begin(run)
    for now[0], tokens in ((30.0, 100), (50.0, 200)):
        assert watch.first_estimate() is None and watch.left_in_words() == "time left not known yet"
        metrics.append({"iteration": tokens // 100, "tokens": tokens})
        watch.seconds_left()
    now[0] = 60.0  # Between two iterations the estimate does not grow.
    assert watch.seconds_per_run() == pytest.approx(210.0)
    assert watch.seconds_left() == pytest.approx(210.0 * 3.8)
    assert "a run takes 4 min, and 4 of them 14 min: 13 min left" in watch.first_estimate()
    now[0] = 200.0
    watch.end(run)
    assert watch.seconds_left() == pytest.approx(600.0)
