"""The kit from Python: the README's lines run as they stand, and summaries have the fields that their types promise."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_type_hints

import pytest

import hapo_lite
from hapo_lite.runs.summary import (
    AccuracySummary,
    EndsSummary,
    HeldOutSummary,
    RunSummary,
    SuiteSummary,
    VerdictSummary,
    WarmSummary,
)
from tests.commands import ENVIRONMENT
from tests.conftest import ROOT

SMALLER = (
    "logging.progress=false",
    "training.iterations=2",
    "rollout.prompts_per_iteration=4",
    "rollout.completions_per_prompt=4",
    "evaluation.prompts=4",
    "evaluation.samples=2",
    "benchmark.samples=2",
    "reward.workers=1",
    "sft.updates=2",
    "data.limit=64",
)


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_lines_of_the_readme_run_one_after_the_other(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    code = "\n".join(readme_blocks())
    assert code.count("load_recipe(") == 3 and code.count("benchmark.limit=64") == 1
    # `make train` has made runs/tiny_cpu, where these recipes would be refused.
    assert code.count('["name=api"') == 3
    # The same lines with fewer iterations and problems.
    code = code.replace("benchmark.limit=64", "benchmark.limit=2").replace("sft.updates=30", "sft.updates=2")
    code = re.sub(r'(load_recipe\("[^"]+", \[)', rf"\1{', '.join(map(repr, SMALLER))}, ", code)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for line in (
        r"^\{'before': \d.*'after'",
        r"runs/api-sft, sha256 ",
        r"^[\w ]+: avg@2 ",
        r"(True|False) tensor",
    ):
        assert re.search(line, done.stdout, flags=re.MULTILINE), line


def test_summaries_have_the_fields_of_their_types(make_recipe):
    small = ["evaluation.prompts=2", "evaluation.samples=2", "training.iterations=1", "data.limit=64"]
    recipe = make_recipe(*small, "sft.updates=1", "benchmark.limit=2", "benchmark.samples=2")
    warm, trained = hapo_lite.sft(recipe), hapo_lite.train(recipe)
    [suite] = hapo_lite.evaluate(recipe).values()
    for found, kind in (
        (warm, WarmSummary),
        (warm["held_out_loss"], EndsSummary),
        (warm["accuracy"], AccuracySummary),
        (trained, RunSummary),
        (trained["evaluation"], HeldOutSummary),
        (trained["verdict"], VerdictSummary),
        (suite, SuiteSummary),
    ):
        assert found.keys() == get_type_hints(kind).keys()
    assert trained["evaluation"]["samples"] == 2 and warm["updates"] == 1
