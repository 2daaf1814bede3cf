"""Runs as people have them: a schedule that is stretched, a folder named wandb, an evaluation too early."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.evaluate.__main__ import main as evaluate
from hapo_lite.train.accelerator import make_accelerator
from tests.conftest import TINY
from tests.test_run import train_here


def test_a_schedule_that_is_stretched_on_resume_is_said_with_the_rates(tmp_path, capsys):
    linear = ("training.schedule=linear", "training.warmup_updates=0", "evaluation.prompts=0")
    assert train_here(tmp_path, *linear, "training.iterations=2") == 0
    capsys.readouterr()
    assert train_here(tmp_path, *linear, "training.iterations=4", "logging.progress=false") == 0
    printed = capsys.readouterr().out
    assert "note: training.iterations was 2 and is 4, over which training.schedule = linear falls" in printed
    assert "goes from 0.00e+00 to 2.50e-04; training.iterations=2 keeps it" in printed


def test_a_constant_rate_does_not_jump(tmp_path, capsys):
    constant = ("training.warmup_updates=0", "evaluation.prompts=0")
    assert train_here(tmp_path, *constant, "training.iterations=1") == 0
    assert train_here(tmp_path, *constant, "training.iterations=2") == 0
    assert "learning rate goes" not in capsys.readouterr().out


def test_an_evaluation_of_an_unfinished_run_names_its_checkpoint(tmp_path, capsys):
    assert train_here(tmp_path, "training.iterations=2", "evaluation.prompts=0") == 0
    run = tmp_path / "tiny_cpu"
    for path in sorted((run / "adapter").iterdir()):
        path.unlink()
    (run / "adapter").rmdir()
    small = ["benchmark.limit=1", "benchmark.samples=1", "benchmark.max_new_tokens=2", "--suite", "tiny"]
    assert run_command(evaluate, [str(TINY), f"output_dir={tmp_path}", *small, "reward.workers=1"]) == 0
    checkpoint = run / "checkpoints" / "000002"
    assert f"tiny alone, since the run is not finished (--adapter {checkpoint} evaluates" in capsys.readouterr().out


def test_a_folder_named_wandb_is_no_tracker(make_recipe, tmp_path, monkeypatch):
    if "wandb" in importlib.metadata.packages_distributions():
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UserError, match="pip install wandb"):
        make_accelerator(make_recipe("logging.report_to=wandb"))
