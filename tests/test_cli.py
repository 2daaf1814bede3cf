"""Bad input at the command line: one sentence on stderr, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hapo_lite.cli import QUIET, run_command
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


SOON = {
    "train": ([str(TINY), "training.learning_rate=x"], "training.learning_rate = 'x': input should be a valid number"),
    "evaluate": ([str(TINY), "benchmark.samples=0"], "benchmark.samples = 0"),
    "probe": ([str(TINY), "data.curriculum=easy_first"], "needs data.pass_rate.file"),
    "preflight": (["tiny_cpu", "method=happo"], "did you mean hapo?"),
    "compare": (["compare_tiny", "tokens=0"], "tokens = 0"),
    "verify_resume": (["tiny_cpu", "sead=1"], "sead is not a field"),
}
"""By command: a command line with a mistake in its settings, and words of the sentence about it."""

IN_A_FRESH_PROCESS = """
import contextlib, importlib, io, json, sys

commands, heavy = json.loads(sys.argv[1]), ("torch", "transformers", "datasets", "numpy", "accelerate", "gradio")
said = {}
for name, arguments in commands:
    sys.argv = [name, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = importlib.import_module(f"hapo_lite.{name}.__main__").command()
        except SystemExit as stop:
            code = stop.code
    said[" ".join([name, *arguments])] = [code, printed.getvalue(), [m for m in heavy if m in sys.modules]]

import datasets
import transformers

said["quiet"] = [
    transformers.logging.get_verbosity() == transformers.logging.ERROR,
    transformers.logging.is_progress_bar_enabled(),
    datasets.logging.get_verbosity() == datasets.logging.ERROR,
    datasets.are_progress_bars_disabled(),
]
print(json.dumps(said))
"""


def test_mistakes_and_help_wait_for_no_library():
    """The sentence appears before torch is imported, which takes seconds. Later, libraries are quiet all the same."""
    helps = [[path.parent.name, ["--help"]] for path in sorted((ROOT / "hapo_lite").glob("*/__main__.py"))]
    wrong = [[name, arguments] for name, (arguments, _) in SOON.items()]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, json.dumps(wrong + helps)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name not in QUIET},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("quiet") == [True, False, True, True]
    assert len(said) == len(wrong) + len(helps) and len(helps) == 10
    for line, (code, printed, imported) in said.items():
        assert imported == [], line
        message = "usage: " if line.endswith("--help") else SOON[line.split()[0]][1]
        assert (code, message in printed) == (0 if line.endswith("--help") else 2, True), (line, printed)


def test_help_needs_no_model_and_lists_the_fields():
    done = subprocess.run(
        [sys.executable, "-m", "hapo_lite.train", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0
    assert "rollout.temperature (float, default 1.0): T_base" in done.stdout
