"""Unsloth's place, without Unsloth: what is asked of it, and that environment and modes are as they were.

The model here is the real one; its forward keeps the one promise of Unsloth's that the policy relies on.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.unsloth import HIDDEN_STATES, UnslothPolicy
from hapo_lite.recipe import load_recipe
from hapo_lite.records import EncodedPrompt, Prompt, Request, Sequences
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.rollout.unsloth_engine import UnslothEngine
from tests.conftest import TINY


class Fast:
    """The two switches, as Unsloth's FastLanguageModel has them."""

    def __init__(self):
        self.calls = []

    def for_inference(self, model):
        self.calls.append("inference")
        model.eval()

    def for_training(self, model, use_gradient_checkpointing=True):
        self.calls.append("training")
        self.checkpointing = use_gradient_checkpointing
        model.train()


@pytest.fixture
def plain():
    return load_policy(load_recipe(TINY).model, 0, "cpu")


@pytest.fixture
def unsloth(plain, monkeypatch):
    base = plain.model.get_base_model()
    forward = type(base).forward

    def promised(self, *args, **kwargs):
        if os.environ.get(HIDDEN_STATES) != "1":
            return forward(self, *args, **kwargs)
        return CausalLMOutputWithPast(logits=self.model(kwargs["input_ids"], use_cache=False).last_hidden_state)

    monkeypatch.setattr(type(base), "forward", promised)
    monkeypatch.setattr(plain.model, "fast_generate", plain.model.generate, raising=False)
    return UnslothPolicy(**{f.name: getattr(plain, f.name) for f in fields(plain)}, fast=Fast())


@pytest.fixture
def requests(plain):
    ids = tuple(plain.encode([{"role": "user", "content": "3*4+2=?"}]))
    return [Request(EncodedPrompt(0, Prompt("0", (("user", "3*4+2=?"),), "14"), ids), sample) for sample in range(4)]


def test_it_samples_and_scores_as_the_plain_policy_does(plain, unsloth, requests, monkeypatch):
    theirs = TransformersEngine(plain, 8, 24).sample(requests, AdaptiveTemperature(None), DrawKey(1, Stage.TRAINING, 2))
    ours = UnslothEngine(unsloth, 8, 24).sample(requests, AdaptiveTemperature(None), DrawKey(1, Stage.TRAINING, 2))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(ours, theirs, strict=True))
    assert unsloth.fast.calls == ["inference", "training"] and unsloth.model.training
    batch = Sequences.of(ours)
    monkeypatch.setenv(HIDDEN_STATES, "0")
    for a, b in zip(unsloth.completion_logprobs(batch), plain.completion_logprobs(batch), strict=True):
        assert torch.equal(a, b)
    assert os.environ[HIDDEN_STATES] == "0"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_a_rollout_checkpointing_is_as_the_recipe_has_it(unsloth, checkpointing):
    policy = replace(unsloth, checkpointing=checkpointing)
    with policy.sampling():
        pass
    assert policy.fast.checkpointing is checkpointing


def test_environment_and_modes_come_back_after_a_failure(unsloth, requests, monkeypatch):
    monkeypatch.delenv(HIDDEN_STATES, raising=False)
    with pytest.raises(IndexError):
        unsloth.hidden_states(torch.tensor([[10**6]]))
    assert HIDDEN_STATES not in os.environ
    with pytest.raises(ZeroDivisionError), unsloth.sampling() as model:
        assert not model.training and not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert unsloth.model.training and torch.is_grad_enabled()
    unsloth.model.eval()
    with unsloth.sampling():
        pass
    assert unsloth.fast.calls == ["inference", "training", "inference"]


def test_an_unsloth_that_breaks_the_promise_is_named(plain):
    broken = UnslothPolicy(**{f.name: getattr(plain, f.name) for f in fields(plain)}, fast=Fast())
    with pytest.raises(UserError, match=f"does not know {HIDDEN_STATES}"):
        broken.hidden_states(torch.tensor([[5, 6]]))


def test_without_a_gpu_or_the_package_it_says_so(monkeypatch):
    settings = load_recipe(TINY, ["rollout.engine=unsloth"]).model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"rollout\.engine = unsloth needs a GPU: use rollout\.engine=transformers"):
        load_policy(settings, 0, "cpu", engine="unsloth")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(UserError, match=r"unsloth cannot be imported .*: pip install -e \.\[unsloth\]"):
        load_policy(settings, 0, "cpu", engine="unsloth")
