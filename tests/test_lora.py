"""The adapter as two products: peft's numbers and gradients, the sampler's arithmetic in training, and what it leaves
to peft; and an update with the unpacked base."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from hapo_lite.model.load import load_policy
from hapo_lite.model.lora import TwoProducts, held_factors, use_two_products
from hapo_lite.model.unpacked import UnpackedBase, Unpacking
from hapo_lite.recipe import LoraSettings, ModelSettings, load_recipe
from hapo_lite.records import Sequences
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.memory.predict import Predictor
from tests.conftest import TINY, noisy_adapter
from tests.loops import adapter_digest

IDS = torch.tensor([[3, 9, 27, 81, 4, 12], [5, 25, 125, 6, 0, 0]])
BATCH = Sequences(IDS, torch.tensor([2, 1]), torch.tensor([4, 3]), torch.tensor([[True] * 4, [True] * 3 + [False]]))


def pefts(model: nn.Module) -> nn.Module:
    """The model with peft's own forward in every layer."""
    for layer in model.modules():
        vars(layer).pop("forward", None)
    return model


def load(quantization="none", dtype="fp32", alpha=12.0):
    settings = ModelSettings(
        name="tiny", quantization=quantization, dtype=dtype, lora=LoraSettings(rank=8, alpha=alpha)
    )
    return load_policy(settings, 0, "cpu")


def logp_and_gradients(policy):
    logp, _ = policy.completion_logprobs(BATCH)
    (logp * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    gradients = {name: p.grad.double() for name, p in policy.trainable().items()}
    for p in policy.trainable().values():
        p.grad = None
    return logp.detach().double(), gradients


def largest_difference(a, b) -> float:
    """Over all matrices, relative to the largest entry of each."""
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in b)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("alpha", [12.0, 16.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_numbers_and_gradients_are_those_of_peft(quantization, alpha, checkpointing):
    policy = load(quantization, alpha=alpha)
    assert sum(isinstance(vars(m).get("forward"), TwoProducts) for m in policy.model.modules()) == 21
    if checkpointing:
        policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with noisy_adapter(policy, 0.05, 1):
        logp, gradients = logp_and_gradients(policy)
        pefts(policy.model)
        expected, expected_gradients = logp_and_gradients(policy)
    assert (logp - expected).abs().max() < 1e-5
    assert largest_difference(gradients, expected_gradients) < 1e-4


def test_in_bf16_it_is_no_farther_from_exact_numbers_than_peft():
    policy, exact = load(dtype="bf16"), load()
    for mine, theirs in zip(exact.model.parameters(), policy.model.parameters(), strict=True):
        mine.data = theirs.data.float()  # fp32 arithmetic on the weights as bf16 rounds them
    with noisy_adapter(policy, 0.05, 1), noisy_adapter(exact, 0.05, 1):
        logp, gradients = logp_and_gradients(policy)
        expected, expected_gradients = logp_and_gradients(exact)
        pefts(policy.model)
        peft_logp, peft_gradients = logp_and_gradients(policy)

    def error(found):
        return sum(float((found[name] - g).norm() / g.norm()) for name, g in expected_gradients.items())

    assert (logp - expected).abs().mean() < 1.5 * (peft_logp - expected).abs().mean()
    assert error(gradients) < 1.5 * error(peft_gradients)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampler_and_trainer_compute_the_same(dtype):
    """The same operators on the same shapes: held factors change nothing but when they are cast."""
    policy = load(dtype=dtype)
    layer = next(m for m in policy.model.modules() if isinstance(m, LoraLayer))
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).to(policy.dtype)
    with noisy_adapter(policy, 0.05, 1), policy.autocast():
        training = layer(x)
        with torch.no_grad(), held_factors(policy.model, policy.dtype):
            sampling = layer(x)
    assert training.requires_grad and training.shape == (3, 5, 128)
    assert torch.equal(training, sampling) and not torch.equal(sampling, layer.base_layer(x))


def small(**settings) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **({"init_lora_weights": False} | settings))
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    use_two_products(model)
    return model


def test_an_adapter_switched_off_merged_or_of_another_kind_is_left_to_peft():
    x = torch.randn(7, 6)
    model = small()
    layer = model.base_model.model[0]
    with_adapter = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x)) and not torch.allclose(model(x), with_adapter)
    model.merge_adapter()
    assert torch.allclose(model(x), with_adapter, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(x), with_adapter, atol=1e-5)
    other = small(lora_bias=True)
    assert torch.equal(other(x), pefts(copy.deepcopy(other))(x))
    noisy = small(lora_dropout=0.5)
    assert not torch.equal(noisy(x), noisy(x))
    noisy.eval()
    assert torch.allclose(noisy(x), pefts(copy.deepcopy(noisy))(x), atol=1e-6)


def test_a_copy_of_a_model_computes_with_its_own_adapter():
    model, x = small(), torch.randn(7, 6)
    before, twin = model(x), copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), before) and not twin(x).any()


def test_an_update_with_the_unpacked_base_ends_with_the_same_adapter(make_loop, make_recipe, monkeypatch):
    ends, made = [], []
    held = UnpackedBase.held
    monkeypatch.setattr(
        UnpackedBase, "held", lambda base, in_update=False: made.append(in_update) or held(base, in_update)
    )
    for wanted in (Unpacking.IF_FREE, Unpacking.NEVER):
        loop = make_loop(make_recipe())
        loop.policy.dense.wanted = wanted
        loop.step(TrainState())
        ends.append(adapter_digest(loop))
    assert ends[0] == ends[1] and True in made


@pytest.mark.parametrize(("times", "made"), [(19.9, False), (20.0, True)])
@pytest.mark.parametrize("wanted", [Unpacking.IF_FREE, Unpacking.DECIDED, Unpacking.ALWAYS])
def test_in_an_update_the_copy_is_made_where_it_is_small_beside_the_free_memory(monkeypatch, times, made, wanted):
    policy = load("nf4")
    policy.dense.wanted = wanted
    free = SimpleNamespace(available=int(times * policy.dense.size))
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with policy.unpacked(exact=True, in_update=True):
        assert any("forward" in vars(layer) for layer in policy.dense._layers) is made
    policy.dense.wanted = Unpacking.NEVER
    with policy.unpacked(exact=True, in_update=True):
        assert not any("forward" in vars(layer) for layer in policy.dense._layers)


def test_the_prediction_counts_it_where_an_update_makes_it():
    recipe = load_recipe(TINY)
    predictor = Predictor(recipe, "cpu")
    enough = sum(predictor.resident.values()) + 20 * predictor.unpacked
    assert not predictor.unpacks_in_update(recipe, enough - 20)
    assert not predictor.unpacks_in_update(load_recipe(TINY, ["rollout.unpacked_base=never"]), enough)
    predictor.device = "cuda"
    assert not predictor.unpacks_in_update(recipe, enough)
    predictor.device = "cpu"
    assert predictor.stages(room=enough)[2].parts["unpacked base"] == predictor.unpacked
