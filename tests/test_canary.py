"""The check before training: an engine that does not sample from the trained policy is stopped, with the numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.engine_check import faulty_engines
from benchmarks.sampler import PlainPolicy
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import load_recipe
from hapo_lite.rollout import canary
from hapo_lite.rollout.canary import check_engine
from hapo_lite.rollout.engine import make_engine
from hapo_lite.rollout.generate_engine import GenerateEngine
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train import run
from tests.conftest import TINY, noisy_adapter


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(TINY)


@pytest.fixture
def loop(make_loop, recipe):
    return make_loop(recipe)


def check(loop, engine, seed=0):
    return check_engine(engine, loop.policy, loop.stream.take(8 * seed, 8), loop.recipe.rollout, seed, loop.accelerator)


def computing(loop, dtype, quantization="none"):
    """The loop on the same model in another dtype; accelerate keeps to one in a process."""
    settings = loop.recipe.model.model_copy(update={"dtype": dtype, "quantization": quantization})
    loop.recipe = loop.recipe.model_copy(update={"model": settings})
    loop.policy = load_policy(settings, loop.recipe.seed, "cpu")
    return loop


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_an_engine_on_the_policy_itself_passes_and_the_adapter_is_restored_to_the_last_bit(loop):
    before = weights(loop.policy)
    found = check(loop, loop.collector.engine)
    assert found.at_rest.engine < 1e-5 and found.perturbed.engine < 1e-5
    assert found.moved > 0.1 and found.followed == pytest.approx(1.0, rel=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in loop.policy.model.named_parameters())
    assert all(p.grad is None for p in loop.policy.model.parameters())
    assert loop.policy.model.training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_right_engine_is_never_accused_and_each_fault_is_always_caught(loop, dtype, quantization):
    loop = computing(loop, dtype, quantization)
    swapped = loop.recipe.model.model_copy(update={"quantization": {"nf4": "none", "none": "nf4"}[quantization]})
    other = load_policy(swapped, loop.recipe.seed, "cpu")
    for seed in range(2):
        check(loop, make_engine(loop.recipe, loop.policy), seed)
        for name, engine in faulty_engines(loop.recipe, loop.policy, other, seed).items():
            base = name == "another quantisation of the base"
            with pytest.raises(
                UserError, match="even before the adapter is perturbed" if base else "is not the current"
            ):
                print(f"seed {seed}, {name}: {check(loop, engine, seed)}")


def test_an_engine_that_rounds_otherwise_is_not_accused(loop):
    loop = computing(loop, "bf16")
    plain = PlainPolicy(**vars(loop.policy))
    for seed in range(4):
        found = check(loop, GenerateEngine(plain, 64, 32), seed)
        assert found.at_rest.engine > 0 and found.followed == pytest.approx(1.0, abs=0.05)


def test_a_stale_copy_of_the_weights_is_caught(loop, recipe):
    """Before training the copy agrees to the last bit: only the perturbation tells it apart."""
    copy = load_policy(recipe.model, recipe.seed, "cpu")
    before = weights(loop.policy)
    with pytest.raises(UserError, match=r"rollout\.engine = transformers does not sample from the policy") as error:
        check(loop, make_engine(recipe, copy))
    at_rest, _, perturbed, _ = map(float, re.findall(r"\d\.\de-?\+?\d\d", str(error.value)))
    assert at_rest < 1e-5 and perturbed >= 5e-3
    assert "follow 0.0% of the change" in str(error.value).replace("-0.0%", "0.0%")
    assert "use rollout.engine=transformers" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in loop.policy.model.named_parameters())


def test_another_engine_is_told_of_the_reference(loop, recipe):
    loop.recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"engine": "paged"})})
    copy = load_policy(recipe.model, recipe.seed, "cpu")
    with pytest.raises(UserError, match=r"rollout\.engine = paged does not .* use rollout\.engine=transformers"):
        check(loop, make_engine(recipe, copy))


def test_an_engine_without_the_adapter_is_caught_when_a_run_goes_on(loop, recipe):
    fresh = load_policy(recipe.model, recipe.seed, "cpu")
    with noisy_adapter(loop.policy, 0.3, 5), pytest.raises(UserError, match="does not sample from the policy"):
        check(loop, make_engine(recipe, fresh))


def test_prompts_that_are_too_long_are_passed_over_however_many_come_first(loop):
    def checked(prompts):
        return check_engine(
            loop.collector.engine, loop.policy, prompts, loop.recipe.rollout, 0, loop.accelerator
        ).at_rest.engine

    assert checked([*[None] * 2 * canary.OFFERED, *loop.stream.take(0, 8)]) < 1e-5
    with pytest.raises(UserError, match=r"too long: raise data\.max_prompt_tokens"):
        checked([None])


def test_an_adapter_that_reaches_nothing_is_named(loop):
    for name, p in loop.policy.trainable().items():
        if "lora_A" in name:
            p.data.zero_()
    with pytest.raises(UserError, match="no change of the adapter moves"):
        check(loop, loop.collector.engine)


def test_an_adapter_that_destroys_the_policy_at_once_is_named(make_loop):
    loop = make_loop(load_recipe(TINY, ["model.lora.alpha=1e38"]))
    with pytest.raises(UserError, match=r"lower model\.lora\.alpha"):
        check(loop, loop.collector.engine)


def test_numbers_that_are_none_are_no_agreement():
    nothing = float("nan")
    distance = canary.Distance(nothing, nothing, nothing, nothing)
    fine = canary.Distance(0.0, 0.0, 0.0, 0.0)
    found = canary.Canary(fine, fine, 1.0, 1.0)
    assert found.right and not replace(found, perturbed=distance).right and not replace(found, moved=nothing).right


def test_a_run_stops_before_its_first_iteration(recipe, tmp_path, monkeypatch):
    copy = load_policy(recipe.model, recipe.seed, "cpu")
    monkeypatch.setattr(run, "make_engine", lambda recipe, policy: make_engine(recipe, copy))
    with pytest.raises(UserError, match="does not sample from the policy"):
        run.train(load_recipe(TINY, [f"output_dir={tmp_path}", "data.limit=32", "evaluation.prompts=8"]))
    assert not (tmp_path / recipe.name / "metrics.jsonl").read_text()


@pytest.mark.parametrize("truncation", ["rollout.top_p=0.6", "rollout.min_p=0.8"])
def test_truncation_in_training_samples_from_what_is_kept(make_loop, truncation):
    small = ["rollout.prompts_per_iteration=4", truncation, "method.importance=truncated"]
    completions = make_loop(load_recipe(TINY, small)).sample(TrainState(iteration=1)).completions
    lifted = torch.cat([c.sampling_logp - c.base_logp for c in completions])
    assert (lifted > -1e-4).all() and (lifted > 0.1).float().mean() > 0.05
