"""Real weights: a run in each dtype, once for all tests. `make test-all` takes smollm2, `make test-qwen` qwen.

HAPO_REAL_MODELS names a folder with smollm2/ and qwen/, as `from_pretrained` loads them; the Makefile sets it. Any copy
of the hub's models serves. HAPO_REAL_DATA names a folder with gsm8k_train.parquet and gsm8k_test.parquet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.train import run
from hapo_lite.train.memory.live import tensors_of
from tests.commands import own_precision
from tests.conftest import ROOT, TINY
from tests.loops import digest

MODELS = [pytest.param("smollm2", marks=pytest.mark.slow), pytest.param("qwen", marks=pytest.mark.by_hand)]
DATA = Path(os.environ.get("HAPO_REAL_DATA", ROOT.parent / "shared" / "data"))
GSM8K = {split: DATA / f"gsm8k_{split}.parquet" for split in ("train", "test")}

WAYS = {
    "fp32": ["model.quantization=none", "model.dtype=fp32"],
    "bf16": ["model.quantization=none", "model.dtype=bf16"],
    "nf4": ["model.quantization=nf4", "model.dtype=fp32"],
}
"""What a base may be kept and computed in."""
GAP = {"fp32": 2e-5, "bf16": 4e-2, "nf4": 2e-5}
"""Largest mean distance between two ways to a log-probability, nats a token: by the dtype that is computed in."""


@dataclass(frozen=True)
class Trained:
    """A finished run and its policy. adapter, base: the adapter's parameters and the base's digest before it."""

    way: str
    recipe: Recipe
    policy: Policy
    adapter: dict[str, Tensor]
    base: str

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir


def base_digest(policy: Policy) -> str:
    """Of all that the base consists of, the scales of 4-bit weights included."""
    adapter = {id(p) for p in policy.trainable().values()}
    return digest(t for t in tensors_of(policy.model) if id(t) not in adapter)


@pytest.fixture(scope="package", params=MODELS)
def model(request) -> Path:
    """A folder with real weights."""
    models = os.environ.get("HAPO_REAL_MODELS")
    if not models:
        pytest.skip("HAPO_REAL_MODELS names no folder with models: run it with make")
    if not (Path(models) / request.param / "tokenizer.json").is_file():
        pytest.skip(f"HAPO_REAL_MODELS holds no model {request.param}/")
    for file in GSM8K.values():
        if not file.is_file():
            pytest.skip(f"HAPO_REAL_DATA holds no {file.name}")
    return Path(models) / request.param


@pytest.fixture(scope="package")
def settings(model) -> list[str]:
    """Overrides of the tiny recipe: few, short completions of real problems by a real model."""
    return [
        f"model.name={model}",
        f"data.source={GSM8K['train']}",
        "data.max_prompt_tokens=64",
        "rollout.prompts_per_iteration=2",
        "rollout.completions_per_prompt=4",
        "rollout.max_new_tokens=24",
        "rollout.old_logprobs=recomputed",
        "reward.workers=1",
        # Every group has something to learn from, although a small model solves few of the problems.
        "reward.function=tests.rewards:every_other",
        "training.iterations=2",
        "training.updates_per_iteration=1",
        "training.micro_batch_tokens=352",
        "training.learning_rate=1e-3",
        "training.warmup_updates=0",
        "evaluation.prompts=0",
        "checkpoint.every=1",
        "logging.progress=false",
        "logging.traces_per_iteration=8",
    ]


@pytest.fixture(scope="package", params=WAYS)
def trained(request, settings, tmp_path_factory) -> Iterator[Trained]:
    """A run of two iterations of one update, from the check to the summary; the second adapts its temperature."""
    output = f"output_dir={tmp_path_factory.mktemp('real')}"
    recipe = load_recipe(TINY, [*settings, *WAYS[request.param], f"name={request.param}", output])
    before: list = []
    load = run.load_policy

    def seen(*arguments, **options) -> Policy:
        policy = load(*arguments, **options)
        adapter = {name: p.detach().clone() for name, p in policy.trainable().items()}
        before[:] = policy, adapter, base_digest(policy)
        return policy

    with pytest.MonkeyPatch.context() as patch, own_precision():
        patch.chdir(ROOT)
        patch.setattr(run, "load_policy", seen)
        run.train(recipe)
    yield Trained(request.param, recipe, *before)
    before.clear()
