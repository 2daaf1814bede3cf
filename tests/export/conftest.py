"""One run for all tests of exports, and two exports of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hapo_lite.cli import run_command
from hapo_lite.export import __main__ as command
from hapo_lite.train import __main__ as train
from tests.conftest import TINY


@pytest.fixture(scope="package")
def finished(tmp_path_factory) -> Path:
    """A run of four iterations at a learning rate that shows."""
    folder = tmp_path_factory.mktemp("export")
    settings = [
        f"output_dir={folder}",
        "rollout.prompts_per_iteration=4",
        "rollout.completions_per_prompt=4",
        "training.iterations=4",
        "training.learning_rate=0.002",
        "training.warmup_updates=0",
        "evaluation.prompts=4",
        "evaluation.samples=2",
        "reward.workers=1",
        "logging.progress=false",
    ]
    assert run_command(train.main, [str(TINY), *settings]) == 0
    return folder / "tiny_cpu"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """The run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "tiny_cpu", ignore=shutil.ignore_patterns("export")))


@pytest.fixture(scope="package")
def merged(finished) -> Path:
    assert run_command(command.main, [str(finished), "--to", "merged", "--onto", "original"]) == 0
    return finished / "export" / "merged"


@pytest.fixture(scope="package")
def adapter(finished) -> Path:
    assert run_command(command.main, [str(finished), "--to", "adapter"]) == 0
    return finished / "export" / "adapter"
