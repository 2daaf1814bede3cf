"""Whole comparisons through the command line, interrupted and failing."""

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

import pytest
import yaml

from hapo_lite.cli import run_command
from hapo_lite.compare import arms as runner
from hapo_lite.compare.__main__ import main
from hapo_lite.compare.plan import load_comparison, planned_runs
from hapo_lite.compare.report import write_report
from hapo_lite.compare.words import shown
from hapo_lite.errors import UserError
from hapo_lite.runs.lines import MetricsFile, timeless
from hapo_lite.runs.trace import trace_file
from tests.comparisons import ABOUT, FIELDS, write_comparison
from tests.conftest import ROOT


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


def runs_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs.csv").read_text("utf-8").splitlines()))


def remains(folder: Path, seed: int) -> dict[str, object]:
    """What must be the same of the runs with one seed, however often they were interrupted."""
    rows = [
        row for row in csv.DictReader((folder / "runs.csv").read_text("utf-8").splitlines()) if row["seed"] == str(seed)
    ]
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
        *(f"{name}.png" for name in ("accuracy", "solved", "differences", "arms", "entropy", "length", "clipped")),
        "report.html",
        "report.md",
    }
    for arm in ("dapo", "hapo"):
        lines = MetricsFile(folder / f"{arm}-seed0" / "metrics.jsonl").read()
        # Over the budget in the last iteration and not before; evaluated there.
        assert lines[-2]["tokens"] < 1000 <= lines[-1]["tokens"] and "eval/accuracy" in lines[-1]
    assert "4 runs, 2 at a time; how long they take is known" in printed
    assert re.search(r"hapo-seed1: held-out accuracy 0\.\d+ -> 0\.\d+; \d+ s left", printed)
    rows = runs_of(folder)
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
    assert page.tags.count("img") == page.tags.count("source") == 7


def test_the_report_in_markdown_has_the_tables_of_the_page(finished, tmp_path):
    """Every row has as many cells as its heading, and the numbers are those of the CSVs."""
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"output_dir": str(tmp_path)}, sort_keys=False))
    shutil.copytree(finished[0], tmp_path / "pair")
    (tmp_path / "pair" / "dapo-seed1" / "summary.json").unlink()
    comparison = load_comparison(path)
    write_report(comparison, planned_runs(comparison), {})
    text = (tmp_path / "pair" / "report.md").read_text("utf-8")
    assert "1 of 4 runs (dapo-seed1)" in text
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table) - 2 for table in tables] == [2, 1]
    for head, rule, *rows in tables:
        widths = {len(row.split("|")) for row in (head, rule, *rows)}
        assert len(widths) == 1, widths
    (row,) = [row for row in runs_of(tmp_path / "pair") if row["arm"] == "dapo"]
    assert tables[0][2].startswith(f"| dapo | 1 | {float(row['final']):.3f} |")
    with (tmp_path / "pair" / "differences.csv").open(encoding="utf-8") as file:
        (found,) = [line for line in csv.DictReader(file) if line["measure"] == "final"]
    assert tables[1][2].startswith(f"| hapo | 1 | {shown(float(found['difference']), '+.3f')} |")


@pytest.mark.usefixtures("single_threaded")
def test_what_runs_have_in_common_is_measured_once(tmp_path):
    """Before training, runs with one seed are the same policy. An arm that samples otherwise measures for itself."""
    dapo, hapo = FIELDS["arms"]["dapo"], FIELDS["arms"]["hapo"]
    for name, arms in {
        "both": {"dapo": dapo, "hapo": hapo},
        "alone": {"hapo": hapo, "cool": dapo | {"rollout.temperature": 0.5}},
    }.items():
        path = write_comparison(tmp_path, name=name, arms=arms, seeds=[0])
        code, _, complaint = compare(path, "logging.traces_per_iteration=1")
        assert code == 0, complaint

    def lines(comparison: str, arm: str) -> list[dict[str, object]]:
        return MetricsFile(tmp_path / "runs" / comparison / f"{arm}-seed0" / "metrics.jsonl").read()

    runs = [("both", "dapo"), ("both", "hapo"), ("alone", "hapo"), ("alone", "cool")]
    assert ["seconds/evaluate" in lines(*run)[0] for run in runs] == [True, False, True, True]
    first, second = (tmp_path / "runs" / "both" / f"{arm}-seed0" for arm in ("dapo", "hapo"))
    assert f"the evaluation before training is that of {first}" in (
        tmp_path / "runs" / "both" / "logs" / "hapo-seed0.log"
    ).read_text(encoding="utf-8")
    assert trace_file(first / "traces", 0).read_bytes() == trace_file(second / "traces", 0).read_bytes()
    # Nothing else depends on who has measured.
    assert [timeless(x) for x in lines("both", "hapo")] == [timeless(x) for x in lines("alone", "hapo")]


@pytest.mark.slow
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
    assert code == 130 and "stopped by SIGINT; all that was complete is saved" in complaint
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


def test_a_complete_run_needs_no_checkpoint(finished, tmp_path):
    """Checkpoints take most of the disk that a comparison takes."""
    shutil.copytree(finished[0], tmp_path / "pair")
    for checkpoints in (tmp_path / "pair").glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"output_dir": str(tmp_path)}, sort_keys=False))
    code, _, complaint = compare(path)
    assert code == 0, complaint
    assert runs_of(tmp_path / "pair") == runs_of(finished[0])


def test_runs_do_not_share_a_gpu_and_nobody_else_starts_them(monkeypatch, capsys):
    assert runner.runs_at_once(2) == 2
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    assert runner.runs_at_once(1) == 1 and capsys.readouterr().out == ""
    assert runner.runs_at_once(2) == 1
    assert "note: runs go one after another on a GPU" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without accelerate launch or torchrun"):
        runner.runs_at_once(1)


def test_a_second_command_is_refused(finished, monkeypatch):
    monkeypatch.setattr(runner, "PATIENCE_S", 0.0)
    with runner.locked(finished[0]):
        code, printed, complaint = compare(finished[0].parent / "pair.yaml")
    assert code == 2 and "another command works on" in complaint and "waiting for the runs" in printed
