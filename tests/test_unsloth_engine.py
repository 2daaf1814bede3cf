"""Unsloth's place, without Unsloth: what is asked of it, and that environment and modes are as they were.

The model here is the real one; its forward keeps the one promise of Unsloth's that the policy relies on.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from hapo_lite.errors import UserError
from hapo_lite.model.adapter import save_adapter
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


class FastLanguageModel:
    """The class that Unsloth's package has, on transformers and peft. calls: the keywords of each of its functions."""

    calls: ClassVar[dict[str, dict]] = {}

    @classmethod
    def from_pretrained(cls, name, **options):
        cls.calls["from_pretrained"] = options
        return AutoModelForCausalLM.from_pretrained(name, dtype=options["dtype"]), None

    @classmethod
    def get_peft_model(cls, base, **options):
        cls.calls["get_peft_model"] = options
        names = ("r", "lora_alpha", "use_rslora", "target_modules")
        return get_peft_model(base, LoraConfig(**{name: options[name] for name in names}))

    @classmethod
    def for_inference(cls, model):
        model.eval()

    @classmethod
    def for_training(cls, model, **options):
        cls.calls["for_training"] = options
        model.train()


@pytest.fixture
def package(monkeypatch):
    """An `unsloth` to import, and torch that says there is a GPU while the model is loaded."""
    monkeypatch.setattr(FastLanguageModel, "calls", {})
    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.setattr("hapo_lite.model.unsloth.torch.cuda.is_available", lambda: True)
    return FastLanguageModel.calls


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policy_that_unsloth_loads_has_the_recipes_settings(package, checkpointing):
    asked = ["rollout.engine=unsloth", "model.quantization=none", "model.dtype=fp32"]
    settings = load_recipe(TINY, [*asked, f"model.gradient_checkpointing={checkpointing}"]).model
    policy = load_policy(settings, 3, "cpu", engine="unsloth")
    assert isinstance(policy, UnslothPolicy) and policy.fast is FastLanguageModel and policy.dense is None
    assert policy.checkpointing is checkpointing
    theirs = "unsloth" if checkpointing else False
    assert package["from_pretrained"]["use_gradient_checkpointing"] == theirs
    assert package["get_peft_model"]["use_gradient_checkpointing"] == theirs
    assert package["from_pretrained"]["load_in_4bit"] is False and package["get_peft_model"]["random_state"] == 3
    assert package["get_peft_model"]["r"] == package["from_pretrained"]["max_lora_rank"] == settings.lora.rank
    with policy.sampling():
        pass
    assert package["for_training"] == {"use_gradient_checkpointing": checkpointing}


@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize("short", [True, False])
def test_memory_that_runs_out_is_not_laid_on_the_adapter(package, plain, tmp_path, monkeypatch, engine, short):
    """Memory may run out because of the base, or of another program; a tensor of another shape is the adapter's."""
    save_adapter(plain, tmp_path)
    error = torch.OutOfMemoryError("CUDA out of memory") if short else RuntimeError("size mismatch for lora_A")

    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr("hapo_lite.model.unsloth.set_peft_model_state_dict", failing)
    monkeypatch.setattr("hapo_lite.model.adapter.PeftModel.from_pretrained", failing)
    settings = load_recipe(TINY, ["model.quantization=none", "model.dtype=fp32"]).model
    expected = (torch.OutOfMemoryError, "CUDA out of memory") if short else (UserError, "does not fit tiny: size mism")
    with pytest.raises(expected[0], match=expected[1]):
        load_policy(settings, 0, "cpu", adapter=tmp_path, engine=engine)
