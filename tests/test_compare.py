"""Comparisons: the plan, the numbers by hand, and whole ones through the command line, interrupted and failing."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from hapo_lite.cli import run_command
from hapo_lite.compare import arms as runner
from hapo_lite.compare import pace
from hapo_lite.compare.__main__ import main
from hapo_lite.compare.numbers import Numbers, clipped_share, run_numbers
from hapo_lite.compare.plan import load_comparison, planned_runs
from hapo_lite.compare.report import difference_rows, table_rows, write_report
from hapo_lite.compare.words import caveats, findings, shown, verdict
from hapo_lite.errors import UserError
from hapo_lite.recipe import load_recipe
from hapo_lite.runs.lines import MetricsFile
from tests.conftest import ROOT, TINY

ABOUT = "<script>alert('1')</script> & <b>bold</b>"
FIELDS = {
    "name": "pair",
    "about": ABOUT,
    "recipe": str(TINY),
    "settings": {
        "rollout": {"prompts_per_iteration": 4, "completions_per_prompt": 4},
        "training.updates_per_iteration": 2,
        "evaluation": {"every": 2, "prompts": 4, "samples": 2},
        "checkpoint.every": 2,
        "reward.workers": 1,
        "logging.traces_per_iteration": 0,
    },
    "arms": {"dapo": {"method": "dapo"}, "hapo": {"method": "hapo", "method.tau": 0.5}},
    "seeds": [0, 1],
    "tokens": 1000,
    "threshold": 0.3,
}


@pytest.fixture
def write(tmp_path):
    """write(field=value, ...) -> path of a comparison file; None leaves a field out."""

    def make(**changes) -> Path:
        fields = {k: v for k, v in (FIELDS | {"output_dir": str(tmp_path / "runs")} | changes).items() if v is not None}
        path = tmp_path / "pair.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        return path

    return make


# The plan.


def test_arms_differ_in_what_they_say_and_in_nothing_else(write):
    runs = planned_runs(load_comparison(write()))
    assert [run.name for run in runs] == ["dapo-seed0", "hapo-seed0", "dapo-seed1", "hapo-seed1"]
    dapo, hapo = (run.recipe for run in runs[:2])
    assert (dapo.method.preset, hapo.method.preset, hapo.method.tau) == ("dapo", "hapo", 0.5)
    same = {"method", "name"}
    assert dapo.model_dump(exclude=same) == hapo.model_dump(exclude=same)
    assert (dapo.training.max_tokens, dapo.training.iterations) == (1000, 240)
    assert dapo.model_dump(exclude={"name", "seed"}) == runs[2].recipe.model_dump(exclude={"name", "seed"})


def test_the_recipe_is_found_beside_the_comparison_and_kept_with_it(write):
    shutil.copy(TINY, write().parent)
    comparison = load_comparison(write(recipe=TINY.name))
    again = write(**yaml.safe_load(comparison.to_yaml()))
    assert comparison.recipe["model"]["name"] == "tiny" and load_comparison(again) == comparison


def test_overrides_reach_the_comparison_its_arms_and_the_recipe(write):
    comparison = load_comparison(
        write(), ["seeds=[7]", "arms.hapo.method.tau=0.25", "training.learning_rate=1e-4", "max_iterations=9"]
    )
    recipes = [run.recipe for run in planned_runs(comparison)]
    assert [r.training.learning_rate for r in recipes] == [1e-4, 1e-4]
    assert [(r.seed, r.training.iterations) for r in recipes] == [(7, 9), (7, 9)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"dapo": {}}}, "arms must hold at least two"),
        ({"arms": None}, "is the recipe of one run|arms is missing"),
        ({"reference": "dappo"}, "'dappo' is not one of the arms; did you mean dapo"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": [1, 1]}, "a repeated seed repeats its runs"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokns": 5}, "tokns is not a field; did you mean tokens"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"recipe": "nowhere.yaml"}, "there is no recipe at .*nowhere.yaml"),
        ({"arms": {"a/b": {}, "b": {}}}, "arms: 'a/b' must be of letters"),
        ({"arms": {"a": {}, "b": {"evaluation.samples": 2}}}, r"arms.b: evaluation.samples must be the same"),
        ({"arms": {"a": {}, "b": {"data": {"limit": 2}}}}, r"arms.b: data.limit must be the same for all arms"),
        ({"arms": {"a": {}, "b": {"seed": 2}}}, r"arms.b: seed is not set here: use seeds"),
        ({"settings": {"training.max_tokens": 2}}, r"settings: training.max_tokens is not set here: use tokens"),
        ({"settings": {"evaluation.prompts": 0}}, "nothing to compare by"),
        ({"settings": {"training.schedule": "cosine"}}, "must be constant with training.max_tokens"),
        ({"arms": {"a": {}, "b": {"method.tao": 0.1}}}, r"arm b: method.tao is not a field; did you mean method.tau"),
        ({"arms": {"a": {}, "b": {"method": "happo"}}}, "did you mean hapo"),
        ({"arms": {"a": {}, "b": 3}}, "arms.b = 3"),
    ],
)
def test_mistakes_get_one_sentence(write, changes, message):
    with pytest.raises(UserError, match=message) as error:
        planned_runs(load_comparison(write(**changes)))
    assert "\n" not in str(error.value)


def test_each_command_names_the_other(write):
    with pytest.raises(UserError, match=r"is the recipe of one run: use python -m hapo_lite.train"):
        load_comparison(TINY)
    with pytest.raises(UserError, match=r"compares several runs: use python -m hapo_lite.compare"):
        load_recipe(write())


# The numbers.


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
            }
            for i in (1, 2)
        ),
    ]


GRID = np.linspace(0.0, 100.0, 101)


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


def test_a_threshold_that_is_not_reached_counts_as_all_the_tokens():
    run = run_numbers(lines_of([0.2, 0.3, 0.4]), GRID, threshold=0.9)
    assert run.reach is None and run.measures["to_threshold"] == 100.0
    assert run_numbers(lines_of([0.2, 0.3, 0.4]), GRID, threshold=0.1).reach == 0.0


def test_a_run_that_ended_early_is_held_at_its_last_value_and_named(write):
    numbers = numbers_of(write, {("hapo", 0): lines_of([0.2, 0.4, 0.6], tokens=(0, 25, 50))})
    run = numbers.runs["hapo", 0]
    # 25 0.3 + 25 0.5 + 50 0.6 = 50.
    assert run.measures["area"] == pytest.approx(0.5) and run.curves["accuracy"][-1] == 0.6
    assert any("max_iterations" in s and "hapo with seed 0" in s for s in caveats(numbers))


def test_a_run_made_for_more_tokens_is_read_at_this_many():
    lines = [*lines_of([0.2, 0.4, 0.6]), {**lines_of([0.2, 0.4, 0.9])[2], "iteration": 3, "tokens": 300}]
    run = run_numbers(lines, GRID, threshold=0.5)
    assert (run.measures["final"], run.measures["seconds"], run.sampled) == (0.6, 4.0, 110)


def test_clipping_counts_every_bound():
    line = {"clip/low_certain_share": 0.25, "clip/high_uncertain_share": 0.5, "ratio/max": 9.0}
    assert clipped_share(line) == 0.75


def numbers_of(write, lines: dict[tuple[str, int], list[dict]]) -> Numbers:
    comparison = load_comparison(write(seeds=sorted({seed for _, seed in lines}), tokens=100))
    return Numbers(comparison, {key: run_numbers(its, GRID, 0.5) for key, its in lines.items()}, GRID, 0.5)


def test_differences_are_paired_by_seed(write):
    """Seeds spread from 0.3 to 0.7 and hapo always 0.1 above dapo: the means overlap, the difference is sure."""
    finals = {0: 0.3, 1: 0.5, 2: 0.7}
    lines = {("dapo", s): lines_of([0.2, 0.2, f]) for s, f in finals.items()}
    lines |= {("hapo", s): lines_of([0.2, 0.2, f + 0.1]) for s, f in finals.items()}
    numbers = numbers_of(write, lines)
    found = numbers.difference("hapo", "final")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert verdict(numbers, "hapo", "final") == "better" and verdict(numbers, "hapo", "length") == ""
    table = {row["arm"]: row for row in table_rows(numbers)}
    assert table["dapo"]["final"] == pytest.approx(0.5) and table["hapo"]["final"] == pytest.approx(0.6)
    # Of 27 equally likely draws of three seeds one is all 0.3, 1/27 > 2.5 %: the interval goes down to the least.
    assert (table["dapo"]["final_low"], table["dapo"]["final_high"]) == pytest.approx((0.3, 0.7))
    [row] = [row for row in difference_rows(numbers) if row["measure"] == "final"]
    assert (row["difference"], row["pairs"], row["excludes_zero"]) == (pytest.approx(0.1), 3, True)
    assert "By final accuracy, better than dapo: hapo (+0.100)." in findings(numbers)
    # The last evaluation, 0.1 apart, is at 110 tokens and the one before it at 60: at 100 they are 40/50 0.1 apart.
    lead = numbers.band("hapo", "accuracy", less_reference=True)
    assert lead.mean[[0, 60, 100]] == pytest.approx([0.0, 0.0, 0.08]) and lead.low == pytest.approx(lead.high)


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_pairs(write):
    lines = {("dapo", 0): lines_of([0.2, 0.2, 0.3]), ("hapo", 0): lines_of([0.2, 0.2, 0.5])}
    numbers = numbers_of(write, lines | {("hapo", 1): lines_of([0.2, 0.2, 0.9])})
    assert numbers.difference("hapo", "final").value == pytest.approx(0.2)
    assert numbers.mean("hapo", "final").value == pytest.approx(0.7)
    assert "One seed has no interval" in caveats(numbers)[0]


def test_a_number_that_rounds_to_nothing_has_no_sign():
    values = [(-0.0001, "+.3f"), (0.0001, "+.3f"), (-0.4, "+,.0f"), (-0.0006, "+.3f"), (float("nan"), ".3f")]
    assert [shown(*value) for value in values] == ["0.000", "0.000", "0", "-0.001", "-"]


def test_the_time_left_follows_from_the_first_runs_pace(write, monkeypatch):
    """The first tenth is seen after 30 s, start-up included, the second 20 s later: a run takes 30 + 9 x 20 s."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    runs = planned_runs(load_comparison(write()))
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


# Whole comparisons.


@pytest.fixture(scope="module")
def single_threaded():
    """Runs inherit it: sums are then in one order, and no thread spins."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


def compare(path: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, and what was printed, of the command in this process; its runs have processes of their own."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(main, [str(path), *arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, single_threaded) -> tuple[Path, str]:
    """An uninterrupted comparison, two runs at a time; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"output_dir": str(folder)}, sort_keys=False))
    code, printed, complaints = compare(path, "workers=2")
    assert code == 0, complaints
    return folder / "pair", printed


def remains(folder: Path, seed: int) -> dict[str, object]:
    """What must be the same of the runs with one seed, however often they were interrupted."""
    rows = [row for row in csv.DictReader((folder / "runs.csv").open()) if row["seed"] == str(seed)]
    adapters = sorted(folder.glob(f"*-seed{seed}/adapter/adapter_model.safetensors"))
    return {
        "runs": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
        **{path.parent.parent.name: path.read_bytes() for path in adapters},
    }


def test_a_comparison_leaves_everything_it_promises(finished):
    folder, printed = finished
    left = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert left == {
        "comparison.yaml",
        "logs",
        *(f"{arm}-seed{seed}" for arm in ("dapo", "hapo") for seed in (0, 1)),
        *(f"{name}.csv" for name in ("table", "differences", "runs", "curves")),
        *(f"{name}.png" for name in ("accuracy", "differences", "arms", "entropy", "length", "clipped")),
        "report.html",
    }
    for arm in ("dapo", "hapo"):
        lines = MetricsFile(folder / f"{arm}-seed0" / "metrics.jsonl").read()
        # Over the budget in the last iteration and not before; evaluated there.
        assert lines[-2]["tokens"] < 1000 <= lines[-1]["tokens"] and "eval/accuracy" in lines[-1]
    assert "4 runs, 2 at a time; how long they take is known" in printed
    assert re.search(r"hapo-seed1: held-out accuracy 0\.\d+ -> 0\.\d+; \d+ s left", printed)
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    for row in rows:
        summary = json.loads((folder / f"{row['arm']}-seed{row['seed']}" / "summary.json").read_text())
        assert float(row["final"]) == summary["evaluation"]["after"]["eval/accuracy"]
        assert int(row["tokens"]) == summary["sampled_tokens"]
    # Pairs begin with the same prompts and the same random numbers, so the first iteration samples the same.
    first = [MetricsFile(folder / f"{arm}-seed1" / "metrics.jsonl").read()[1]["tokens"] for arm in ("dapo", "hapo")]
    assert first[0] == first[1]


class Page(HTMLParser):
    """The tags of a page, its addresses, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_file_and_its_text_is_escaped(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "pair", ignore=shutil.ignore_patterns("summary.json"))
    shutil.copy(finished[0] / "dapo-seed0" / "summary.json", tmp_path / "pair" / "dapo-seed0")
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"output_dir": str(tmp_path)}, sort_keys=False))
    comparison = load_comparison(path)
    # The folder has moved, which makes no other run of it; three runs lack their summary, and one of them failed.
    write_report(comparison, planned_runs(comparison), {"hapo-seed0": "<i>no memory</i>"})
    text = (tmp_path / "pair" / "report.html").read_text()
    page = Page(text)
    assert page.addresses and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not {"script", "link", "iframe", "object", "form", "i"} & set(page.tags)
    assert "@import" not in text and "url(" not in text
    words = "".join(page.words)
    assert ABOUT in words and "<b>bold" not in text
    assert "3 of 4 runs are not complete" in words and "hapo-seed0 failed: <i>no memory</i>" in words
    assert page.tags.count("img") == page.tags.count("source") == 6


def test_killed_at_any_moment_it_ends_the_same(finished, tmp_path):
    """The comparison is killed, then one of its runs, then Ctrl-C; the same command goes on, and nothing differs."""
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"output_dir": str(tmp_path), "seeds": [0]}, sort_keys=False))
    dapo, hapo = (tmp_path / "pair" / f"{arm}-seed0" for arm in ("dapo", "hapo"))

    def lines(run: Path) -> int:
        return len(MetricsFile(run / "metrics.jsonl").read())

    def when(run: Path, count: int, act: Callable[[], None]) -> threading.Thread:
        """`act` once the run has so many lines of metrics."""

        def watch() -> None:
            while lines(run) < count:
                time.sleep(0.01)
            act()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        return thread

    process = subprocess.Popen([sys.executable, "-m", "hapo_lite.compare", str(path)], stdout=subprocess.DEVNULL)
    when(dapo, 2, process.kill).join()
    process.wait()

    when(hapo, 2, lambda: os.kill(json.loads((hapo / "status.json").read_text())["process"], signal.SIGKILL))
    code, printed, complaint = compare(path)
    assert code == 2 and "hapo-seed0 FAILED: killed by signal 9" in printed
    [sentence] = complaint.splitlines()
    assert sentence.startswith("error: 1 of 2 runs failed, hapo-seed0: killed by signal 9")
    assert "hapo-seed0 failed: killed by signal 9" in (tmp_path / "pair" / "report.html").read_text()
    complete = {p: p.stat().st_mtime_ns for p in dapo.rglob("*")}

    when(hapo, lines(hapo) + 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, _, complaint = compare(path)
    assert code == 130 and "stopped by SIGINT; saved" in complaint
    # Nothing that was finished is lost.
    assert sorted(p.name for p in (hapo / "checkpoints").iterdir())[-1] == f"{lines(hapo) - 1:06d}"

    code, printed, complaint = compare(path)
    assert code == 0, complaint
    assert "1 of 2 runs are complete; the others take about" in printed
    assert {p: p.stat().st_mtime_ns for p in dapo.rglob("*")} == complete
    assert remains(tmp_path / "pair", seed=0) == remains(finished[0], seed=0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0.5", "was made with training.learning_rate = 0.0005, the recipe now says 0.5"),
        ("tokens=0", "tokens = 0: input should be greater than or equal to 1"),
    ],
)
def test_another_recipe_does_not_continue_the_runs(finished, override, message):
    code, _, complaint = compare(finished[0].parent / "pair.yaml", override)
    [sentence] = complaint.splitlines()
    assert code == 2 and sentence.startswith("error: ") and message in sentence


def test_runs_do_not_share_a_gpu_and_nobody_else_starts_them(monkeypatch):
    runner.check_machine(workers=2)
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    runner.check_machine(workers=1)
    with pytest.raises(UserError, match="workers = 2: on a GPU runs go one after another"):
        runner.check_machine(workers=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without accelerate launch or torchrun"):
        runner.check_machine(workers=1)


def test_a_second_command_is_refused(finished, monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE_S", 0.0)
    with runner.locked(finished[0]):
        code, printed, complaint = compare(finished[0].parent / "pair.yaml")
    assert code == 2 and "another command works on" in complaint and "waiting for the runs" in printed
