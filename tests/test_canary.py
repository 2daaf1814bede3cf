"""The check before training: an engine that does not sample from the trained policy is stopped, with the numbers."""

from __future__ import annotations

import re

import pytest
import torch

from hapo_lite import run
from hapo_lite.checkpoint import TrainState
from hapo_lite.errors import UserError
from hapo_lite.policy import load_policy
from hapo_lite.recipe import load_recipe
from hapo_lite.rollout import canary
from hapo_lite.rollout.canary import check_engine, perturbed_adapter
from hapo_lite.rollout.engine import make_engine
from tests.conftest import TINY


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(TINY)


@pytest.fixture
def loop(make_loop, recipe):
    return make_loop(recipe)


def check(loop, engine):
    return check_engine(engine, loop.policy, loop.stream.take(0, 2), loop.recipe, loop.accelerator)


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_an_engine_on_the_policy_itself_passes_and_the_adapter_is_restored_to_the_last_bit(loop):
    before = weights(loop.policy)
    found = check(loop, loop.collector.engine)
    assert found.at_rest < 1e-5 and found.perturbed < 1e-5
    assert found.moved > 5e-3 and found.followed == pytest.approx(found.moved, rel=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in loop.policy.model.named_parameters())
    assert loop.policy.model.training


def test_a_stale_copy_of_the_weights_is_caught(loop, recipe):
    """Before training the copy agrees to the last bit: only the perturbation tells it apart."""
    copy = load_policy(recipe.model, recipe.seed, "cpu")
    before = weights(loop.policy)
    with pytest.raises(UserError, match=r"rollout\.engine = transformers does not sample from the policy") as error:
        check(loop, make_engine(recipe, copy))
    at_rest, perturbed, moved, followed = map(float, re.findall(r"\d\.\de-\d\d", str(error.value)))
    assert at_rest < 1e-5 and followed < 1e-5 and perturbed >= 5e-3 and moved >= 5e-3
    assert all(torch.equal(p, before[name]) for name, p in loop.policy.model.named_parameters())


def test_an_engine_without_the_adapter_is_caught_when_a_run_goes_on(loop, recipe):
    fresh = load_policy(recipe.model, recipe.seed, "cpu")
    with perturbed_adapter(loop.policy, 0.3, 5), pytest.raises(UserError, match="does not sample from the policy"):
        check(loop, make_engine(recipe, fresh))


def test_an_adapter_that_reaches_nothing_is_named(loop, monkeypatch):
    monkeypatch.setattr(canary, "STRENGTHS", [0.0])
    with pytest.raises(UserError, match="no change of the adapter moves"):
        check(loop, loop.collector.engine)


def test_a_run_stops_before_its_first_iteration(recipe, tmp_path, monkeypatch):
    copy = load_policy(recipe.model, recipe.seed, "cpu")
    monkeypatch.setattr(run, "make_engine", lambda recipe, policy: make_engine(recipe, copy))
    with pytest.raises(UserError, match="does not sample from the policy"):
        run.train(load_recipe(TINY, [f"output_dir={tmp_path}", "data.limit=32", "evaluation.prompts=8"]))
    assert not (tmp_path / recipe.name / "metrics.jsonl").read_text()


def test_top_p_in_training_samples_from_the_nucleus(make_loop):
    small = ["rollout.prompts_per_iteration=4", "rollout.top_p=0.6", "method.importance=truncated"]
    completions = make_loop(load_recipe(TINY, small)).rollout(TrainState(), 1).completions
    lifted = torch.cat([c.sampling_logp - c.base_logp for c in completions])
    assert (lifted > -1e-4).all() and (lifted > 0.1).float().mean() > 0.05
