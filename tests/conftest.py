"""Shared pieces: small recipes on the bundled model, and a loop built the way `run.train` builds it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which a library may do; kernels then run on tensors of the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from hapo_lite.cli import quiet_libraries
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.rollout.canary import perturbed_adapter
from hapo_lite.rollout.engine import make_engine
from hapo_lite.tasks.data import Column
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collected, Collector
from hapo_lite.train.loop import Loop
from hapo_lite.train.prompts import encode_prompts, load_data
from hapo_lite.train.scoring import Scored, advantages
from tests.clock import Clock

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny_cpu.yaml"

# So that an assertion which fails in them shows its values.
pytest.register_assert_rewrite("tests.allocations", "tests.inspector.browser")
quiet_libraries()
# Two threads on small matrices wait for each other, for seconds if another program has one of the cores.
torch.set_num_threads(1)


@pytest.fixture
def make_recipe(tmp_path):
    """make_recipe("section.key=value", ...): the tiny recipe, smaller, in a folder of its own."""

    def make(*overrides: str) -> Recipe:
        small = [
            f"output_dir={tmp_path / 'runs'}",
            "rollout.prompts_per_iteration=4",
            "rollout.completions_per_prompt=4",
            "rollout.old_logprobs=recomputed",
            "training.iterations=3",
            "training.updates_per_iteration=2",
            "evaluation.prompts=0",
            "checkpoint.every=0",
            "logging.progress=false",
            "reward.workers=1",
        ]
        return load_recipe(TINY, [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def data_of():
    """data_of(recipe): `load_data`, once for all loops on the same data; it takes longer than the rest of a loop."""
    known = {}

    def load(recipe: Recipe, columns: Sequence[Column] = ()):
        key = recipe.model_dump_json(include={"data", "evaluation", "seed"}) + str(columns)
        if key not in known:
            known[key] = load_data(recipe.data, recipe.evaluation, recipe.seed, lambda text: None, columns)
        return known[key]

    return load


@pytest.fixture
def make_loop(data_of):
    """make_loop(recipe): the moving parts of a run without its folder; graders are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(recipe: Recipe) -> Loop:
            accelerator = make_accelerator(recipe)
            limit = recipe.rollout.max_new_tokens
            scorer = stack.enter_context(Scorer(recipe.reward, limit))
            data = data_of(recipe, scorer.columns)
            policy = load_policy(recipe.model, recipe.seed, accelerator.device)
            encoded = encode_prompts(data.training[:256], policy, recipe.data, limit, say=lambda text: None)
            return Loop(
                recipe,
                policy,
                Collector(make_engine(recipe, policy), scorer, accelerator),
                PromptStream(encoded, recipe.seed),
                encode_prompts(data.held_out, policy, recipe.data, limit, say=lambda text: None),
            )

        yield make


def score(loop: Loop, collected: Collected, iteration: int, traced: Sequence[int] = ()) -> Scored:
    """The plan and the experience of an iteration, as `Loop.learn` makes them."""
    advantage = advantages(collected.graded, loop.recipe.method, loop.recipe.reward.normalised)
    plan = loop.plan(collected.graded, loop.active(advantage.tolist(), traced), iteration)
    return loop.scoring.score(collected.graded, advantage, plan, loop.selection_key(iteration))


@contextlib.contextmanager
def noisy_adapter(policy: Policy, strength: float, seed: int) -> Iterator[None]:
    """Seeded Gaussian noise of that standard deviation on every B matrix; afterwards they are what they were."""
    matrices = [p for name, p in policy.trainable().items() if "lora_B" in name or "lora_embedding_B" in name]
    generator = torch.Generator().manual_seed(seed)
    with perturbed_adapter([(p, torch.randn(p.shape, generator=generator).to(p)) for p in matrices], strength):
        yield


@pytest.fixture
def write_recipe(tmp_path):
    """write_recipe(text or mapping) -> path of a recipe file."""

    def write(content) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB of its own, which is unmounted at the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a file system of its own takes root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()
