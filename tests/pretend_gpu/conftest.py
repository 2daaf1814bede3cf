"""The stages of a run on a pretended GPU, and the table that closes the tests of this folder.

They need a CUDA build of torch and no card: `make pretend-gpu` makes an environment for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import ModelSettings, load_recipe
from hapo_lite.rollout.engine import make_engine
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collector
from hapo_lite.train.loop import Loop
from hapo_lite.train.prompts import encode_prompts
from tests.conftest import TINY
from tests.pretend_gpu.card import found_by_torch, on_card
from tests.pretend_gpu.device import Refused, Watch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.pretend_gpu)


@pytest.fixture(autouse=True)
def card() -> Iterator[None]:
    """A pretended card for one test."""
    if torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch, which loads without a card: make pretend-gpu")
    if torch.cuda.is_available():
        pytest.skip("there is a real GPU here, which shows more")
    torch._C._ensureCUDADeviceGuardSet()
    states = (AcceleratorState, PartialState, GradientState)
    for state in states:
        state._reset_state()
    with found_by_torch():
        yield
    for state in states:
        state._reset_state()


class Stage(Watch):
    """budget: the waits that a stage may take. A test sets it before the stage ends."""

    budget = 0


Watching = Callable[[str, str], AbstractContextManager[Stage]]


@pytest.fixture
def stage(record_property) -> Watching:
    """stage(name, kind): a context for a stage on the pretended card, which makes a row of the table.

    kind: dtype and quantisation, in words. At its end the waits must be within the budget that the test has set.
    """

    @contextlib.contextmanager
    def watching(name: str, kind: str) -> Iterator[Stage]:
        seen, verdict = Stage(), "failed"
        try:
            with seen:
                yield seen
            verdict = "sound" if seen.waited <= seen.budget else "waits too often"
        except Refused:
            verdict = "refused by CUDA"
            raise
        finally:
            record_property("stage", [name, kind, seen.launched, seen.waited, seen.budget, verdict])
        assert seen.waited <= seen.budget, f"{seen.waited} waits, of which {seen.budget} are allowed:\n{seen.report()}"

    return watching


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table of the stages."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)]
    rows = [value for r in reports for name, value in r.user_properties if name == "stage" and r.when == "call"]
    if not rows:
        return
    terminalreporter.section("a pretended GPU")
    terminalreporter.write_line(f"{'stage':44} {'dtype':10} {'kernels':>8} {'waits':>6} {'budget':>6}  verdict")
    for name, kind, kernels, waits, budget, verdict in sorted(rows, key=lambda row: (row[0], row[1])):
        terminalreporter.write_line(f"{name:44} {kind:10} {kernels:8,} {waits:6,} {budget:6,}  {verdict}")


KINDS = {"bf16": "none", "fp16": "none", "bf16, NF4": "nf4"}
"""Kinds of a policy, with model.quantization."""


def model_settings(kind: str) -> ModelSettings:
    """The bundled model in that dtype and quantisation."""
    model = load_recipe(TINY).model
    return model.model_copy(update={"dtype": kind.partition(",")[0], "quantization": KINDS.get(kind, "none")})


def policy_of(kind: str) -> Policy:
    """The bundled model on the pretended card."""
    return on_card(load_policy(model_settings(kind), 0, "cpu"))


@pytest.fixture
def make_loop(make_recipe, data_of) -> Iterator[Callable[..., Loop]]:
    """make_loop(kind, "section.key=value", ...): the moving parts of a run on the pretended card."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, *overrides: str) -> Loop:
            model = model_settings(kind)
            recipe = make_recipe(f"model.dtype={model.dtype}", f"model.quantization={model.quantization}", *overrides)
            data = data_of(recipe)
            accelerator = make_accelerator(recipe)
            policy, limit = policy_of(kind), recipe.rollout.max_new_tokens
            encoded, held_out = (
                encode_prompts(rows, policy, recipe.data, limit, say=lambda text: None)
                for rows in (data.training[:64], data.held_out)
            )
            scorer = stack.enter_context(Scorer(recipe.reward, limit))
            collector = Collector(make_engine(recipe, policy), scorer, accelerator)
            return Loop(recipe, policy, collector, PromptStream(encoded, recipe.seed), held_out)

        yield make
