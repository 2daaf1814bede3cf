"""verify_resume: it kills where it says, finds nothing in a run that resumes, and everything in one that does not."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter

import pytest

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.verify_resume.__main__ import main
from hapo_lite.verify_resume.verify import Findings, compare, left_by, verify
from tests.commands import ENVIRONMENT, SMALL
from tests.conftest import ROOT, TINY

SHORT = ["training.iterations=4", "evaluation.every=2", "data.limit=64", "logging.progress=false"]

FORGETFUL = """
import sys, time
from pathlib import Path
from hapo_lite.runs.status import Status
folder = Path(sys.argv[-1].partition("=")[2]) / "run"
folder.mkdir(exist_ok=True)
with Status(folder / "status.json") as status:
    time.sleep(0.3)
    for iteration in range(1, 5):
        status.doing.iteration = iteration
        status.enter("work")
        time.sleep(0.1)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": %d, "seconds/all": %r}\\n' % (iteration, time.time()))
"""
"""A run that begins again instead of going on, and so writes what it has written already."""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, ENVIRONMENT[name])


def test_a_run_that_is_killed_and_resumed_ends_the_same(tmp_path, capsys):
    findings = verify([sys.executable, "-m", "hapo_lite.train", str(TINY), *SMALL, *SHORT], tmp_path, kills=1, seed=0)
    assert not findings.complaints
    assert len(findings.kills) == 1
    assert set(findings.compared) >= {"adapters", "completions", "files", "numbers", "optimiser states", "prompts"}
    assert not +findings.differing
    assert re.search(r"^all +1   in \d runs$", capsys.readouterr().out, flags=re.MULTILINE)


def test_a_run_that_forgets_is_found_out(tmp_path):
    script = tmp_path / "forgetful.py"
    script.write_text(FORGETFUL)
    findings = verify([sys.executable, str(script)], tmp_path, kills=2, seed=1)
    assert len(findings.kills) == 2 and findings.differing["numbers"] > 0
    assert "run/metrics.jsonl" in findings.complaints[0]


def test_a_run_that_fails_by_itself_is_no_kill(tmp_path):
    with pytest.raises(UserError, match=r"ended with code 2: error: there is no recipe at"):
        verify([sys.executable, "-m", "hapo_lite.train", "nowhere.yaml"], tmp_path, kills=1, seed=0)


def test_every_kind_of_difference_counts(tmp_path):
    """Of two folders that differ in one thing: prompt, completion, number, adapter, optimiser, sample, a file."""
    run = tmp_path / "one" / "run"
    for name in ("traces", "adapter", "checkpoints/000001", "evaluations/tiny"):
        (run / name).mkdir(parents=True)
    trace = {"prompt_id": "p", "messages": [["user", "1 + 1"]], "gold": "2", "text": "two", "tokens": {"id": [5]}}
    (run / "traces" / "000001.jsonl").write_text(json.dumps(trace) + "\n")
    (run / "metrics.jsonl").write_text('{"iteration": 1, "reward/mean": 0.5, "seconds/update": 1.0}\n')
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"abc")
    (run / "checkpoints" / "000001" / "optimizer.pt").write_bytes(b"abc")
    (run / "evaluations" / "tiny" / "base-1.jsonl").write_text('{"prompt": "p", "text": "two"}\n')

    def altered(file: str, old: str, new: str) -> Findings:
        shutil.rmtree(tmp_path / "two", ignore_errors=True)
        shutil.copytree(run.parent, tmp_path / "two")
        path = tmp_path / "two" / "run" / file
        path.write_text(path.read_text().replace(old, new)) if new else path.unlink()
        findings = Findings()
        compare(left_by(run.parent), left_by(tmp_path / "two"), "killed-1", findings)
        return findings

    assert not altered("metrics.jsonl", "1.0", "2.0").complaints  # the clock is not the run's
    for file, old, new, kind in (
        ("traces/000001.jsonl", "1 + 1", "1 + 2", "prompts"),
        ("traces/000001.jsonl", "[5]", "[6]", "completions"),
        ("metrics.jsonl", "0.5", "0.25", "numbers"),
        ("adapter/adapter_model.safetensors", "abc", "abd", "adapters"),
        ("checkpoints/000001/optimizer.pt", "abc", "abd", "optimiser states"),
        ("evaluations/tiny/base-1.jsonl", "two", "three", "samples"),
    ):
        findings = altered(file, old, new)
        assert +findings.differing == {kind: 1}, (file, findings)
        assert file in findings.complaints[0]
    assert altered("metrics.jsonl", "", "").differing["files"] == 1


def test_a_completion_may_hold_any_character(tmp_path):
    """U+2028 and U+0085 end a line of text, and no line of a file of JSON Lines."""
    traces = tmp_path / "run" / "traces"
    traces.mkdir(parents=True)
    trace = {"prompt_id": "p", "messages": [["user", "1 + 1"]], "gold": "2", "text": "a\u2028b\u0085c\x0c\x1e"}
    (traces / "000001.jsonl").write_text(2 * (json.dumps(trace, ensure_ascii=False) + "\n"), encoding="utf-8")
    assert [found["text"] for found in left_by(tmp_path)["completions"].values()] == 2 * [trace["text"]]


@pytest.mark.parametrize(
    ("differing", "complaints", "code"),
    [({"numbers": 2}, ["numbers: one"], 3), ({"numbers": 0}, ["process 7 outlived"], 2), ({"numbers": 0}, [], 0)],
)
def test_the_exit_code_tells_a_difference_from_another_failure(monkeypatch, capsys, differing, complaints, code):
    findings = Findings(differing=Counter(differing), complaints=complaints)
    monkeypatch.setattr("hapo_lite.verify_resume.verify.verify", lambda *arguments: findings)
    assert run_command(main, [str(TINY)]) == code


def test_a_run_that_could_not_be_checked_does_not_differ(monkeypatch, capsys):
    def failing(*arguments):
        raise UserError("the stage save is too short to be hit: 5 runs ended before it was")

    monkeypatch.setattr("hapo_lite.verify_resume.verify.verify", failing)
    assert run_command(main, [str(TINY)]) == 2


def test_there_is_something_to_do(capsys):
    with pytest.raises(UserError, match="at least 1"):
        main([str(TINY), "--kills", "0"])
