"""Bad input at the command line: one sentence on stderr, exit code 2, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hapo_lite.cli import run_command
from hapo_lite.train.__main__ import main
from tests.conftest import ROOT, TINY


def complaint(capsys, arguments) -> str:
    code = run_command(main, [str(a) for a in arguments])
    printed = capsys.readouterr()
    assert code == 2
    [line] = [line for line in printed.err.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line


SHORT = ["training.iterations=1", "evaluation.prompts=0", "logging.progress=false", "rollout.prompts_per_iteration=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.temprature=1"], "did you mean rollout.temperature?"),
        (["training.iterations=many"], "training.iterations = 'many'"),
        (["model.name={folder}"], "without a config.json"),
        (["model.name={folder}/none"], "is not a folder"),
        (["data.source={folder}/none.parquet"], "none.parquet"),
        (["data.source={folder}/empty.jsonl"], "has no rows"),
        (["data.source={folder}/rows.jsonl", "data.problem_column=queston"], "did you mean"),
        (["data.source={folder}/rows.jsonl", "rollout.max_new_tokens=250"], "exceeds the model's context of 256"),
        (["data.max_prompt_tokens=3"], "every prompt is longer than data.max_prompt_tokens = 3"),
        (["reward.function=nowhere:nothing"], "nowhere"),
        (["logging.report_to=wandb"], "pip install wandb"),
        (["model.dtype=fp16"], "needs a GPU"),
        (["data.split=dev"], "'train' and 'test'"),
        (
            ["data.source={folder}/rows.jsonl", "evaluation.prompts=64"],
            "64 prompts are to be held out and there are only 4",
        ),
        (["output_dir={folder}/rows.jsonl"], "cannot be written"),
    ],
)
def test_one_sentence_and_exit_code_2(capsys, tmp_path, overrides, message):
    (tmp_path / "empty.jsonl").write_text("")
    rows = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [o.format(folder=tmp_path) for o in overrides]
    arguments = [TINY, f"output_dir={tmp_path / 'runs'}", *SHORT, *overrides]
    assert message in complaint(capsys, arguments)


def test_a_missing_recipe(capsys, tmp_path):
    assert "there is no recipe at" in complaint(capsys, [tmp_path / "none.yaml"])


def test_metrics_reach_a_tracker(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = [str(TINY), f"output_dir={tmp_path}", *SHORT, "logging.report_to=tensorboard"]
    assert run_command(main, arguments) == 0
    [events] = (tmp_path / "tiny_cpu" / "hapo_lite").glob("events.*")
    accumulated = event_accumulator.EventAccumulator(str(events)).Reload()
    [reward] = accumulated.Scalars("reward/mean")
    line = json.loads((tmp_path / "tiny_cpu" / "metrics.jsonl").read_text().splitlines()[-1])
    assert reward.step == 1 and reward.value == pytest.approx(line["reward/mean"])


def test_help_needs_no_model_and_lists_the_fields():
    done = subprocess.run(
        [sys.executable, "-m", "hapo_lite.train", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0
    assert "rollout.temperature (float, default 1.0): T_base" in done.stdout
