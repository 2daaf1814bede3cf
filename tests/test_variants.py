"""Adapters that are no plain LoRA: rsLoRA's scale, and DoRA's magnitudes in training, in sampling, in the check of the
engine, in checkpoints, in preflight and in `model.adapter`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.architectures.small import save_small_model
from hapo_lite.errors import UserError
from hapo_lite.model.adapter import load_adapter, save_adapter
from hapo_lite.model.load import load_policy
from hapo_lite.model.lora import TwoProducts, held_factors, use_two_products
from hapo_lite.recipe import LoraSettings, ModelSettings, load_recipe
from hapo_lite.rollout.canary import check_engine
from hapo_lite.rollout.engine import make_engine
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.memory.live import total_bytes
from hapo_lite.train.memory.predict import Predictor
from tests.conftest import TINY
from tests.loops import adapter_digest
from tests.test_lora import BATCH, largest_difference, logp_and_gradients, pefts


def load(variant="dora", quantization="none", dtype="fp32", rank=8, alpha=12.0, adapter=None):
    lora = LoraSettings(rank=rank, alpha=alpha, variant=variant)
    return load_policy(ModelSettings(name="tiny", quantization=quantization, dtype=dtype, lora=lora), 0, "cpu", adapter)


def stir(policy):
    """Noise on every B and every magnitude, so that each does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            noise = torch.randn(p.shape, generator=generator)
            if "lora_B" in name:
                p.add_(noise, alpha=0.05)
            elif "magnitude" in name:
                p.mul_(1.0 + 0.1 * noise)
    return policy


def test_dora_by_hand():
    """W = (3 4), B A = (3 4), scaling 1: ||W + B A|| = 10, so m = 5 halves 2 (3x + 4y) and leaves the bias alone."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(2, 1)), LoraConfig(r=1, lora_alpha=1, target_modules=["0"], use_dora=True)
    )
    use_two_products(model)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.base_layer.bias.fill_(7.0)
        layer.lora_A["default"].weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.lora_B["default"].weight.fill_(1.0)
        layer.lora_magnitude_vector["default"].weight.fill_(5.0)
    out = model(torch.tensor([[1.0, 2.0]]))
    assert out.item() == pytest.approx(11.0 + 7.0)
    out.backward()
    # d out / d m = 2 (3 + 8) / 10; d out / d B = m / 10 (3 + 8): the norm has no gradient.
    assert layer.lora_magnitude_vector["default"].weight.grad.item() == pytest.approx(2.2)
    assert layer.lora_B["default"].weight.grad.item() == pytest.approx(5.5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dora_has_the_numbers_and_gradients_of_peft(quantization, checkpointing):
    policy = stir(load(quantization=quantization))
    assert sum(isinstance(vars(m).get("forward"), TwoProducts) for m in policy.model.modules()) == 21
    if checkpointing:
        policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logp, gradients = logp_and_gradients(policy)
    pefts(policy.model)
    expected, expected_gradients = logp_and_gradients(policy)
    assert len(gradients) == 63 and (logp - expected).abs().max() < 1e-5
    assert largest_difference(gradients, expected_gradients) < 1e-4


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), Conv1D(5, 6)])
def test_dora_on_a_layer_with_a_bias_or_a_weight_the_other_way_round(layer):
    torch.manual_seed(0)
    transposed = isinstance(layer, Conv1D)
    nn.init.normal_(layer.bias)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False, fan_in_fan_out=transposed
    )
    model, x = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config), torch.randn(7, 6)
    with torch.no_grad():
        model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    expected = model(x)
    use_two_products(model)
    assert torch.allclose(model(x), expected, atol=1e-6) and not torch.allclose(expected, layer(x), atol=0.1)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert torch.allclose(merged(x), model(x), atol=1e-5)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "fp32"), ("none", "bf16"), ("nf4", "bf16")])
def test_a_new_dora_adapter_is_its_base_to_the_last_bit(quantization, dtype):
    policy = load(quantization=quantization, dtype=dtype)
    logp, _ = policy.completion_logprobs(BATCH)
    with policy.base_alone():
        base, _ = policy.completion_logprobs(BATCH)
    assert torch.equal(logp, base)
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "fp32"), ("nf4", "bf16")])
def test_sampler_and_trainer_compute_the_same_dora(quantization, dtype):
    policy = stir(load(quantization=quantization, dtype=dtype))
    layer = next(m for m in policy.model.modules() if isinstance(m, LoraLayer))
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)).to(policy.dtype)
    with policy.autocast():
        training = layer(x)
        with torch.no_grad(), held_factors(policy.model, policy.dtype):
            sampling = layer(x)
    assert training.requires_grad and torch.equal(training, sampling)
    assert training.dtype == policy.dtype and not torch.equal(sampling, layer.base_layer(x))


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    """6 / sqrt(4) is 12 / 4, to the last bit."""
    rslora, lora = stir(load("rslora", rank=4, alpha=6.0)), stir(load("lora", rank=4, alpha=12.0))
    assert torch.equal(rslora.completion_logprobs(BATCH)[0], lora.completion_logprobs(BATCH)[0])
    found = next(m for m in rslora.model.modules() if isinstance(m, LoraLayer))
    assert found.scaling == {"default": 6.0 / math.sqrt(4)}


def dora_recipe(*overrides):
    return load_recipe(TINY, ["model.lora.variant=dora", *overrides])


def test_the_check_of_the_engine_perturbs_magnitudes_too(make_loop):
    """An engine whose magnitudes are those of the start, and whose matrices are the current ones, is caught."""
    loop = make_loop(dora_recipe())
    recipe, policy = loop.recipe, loop.policy

    def check(engine):
        return check_engine(engine, policy, loop.stream.take(0, 8), recipe.rollout, 0, loop.accelerator)

    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    found = check(loop.collector.engine)
    assert found.moved > 0.1 and found.followed == pytest.approx(1.0, rel=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())
    other = load_policy(recipe.model, recipe.seed, "cpu")
    # Its factors are the policy's own tensors; its magnitudes are a copy.
    theirs, ours = dict(other.model.named_modules()), dict(policy.model.named_modules())
    for name, layer in theirs.items():
        if isinstance(layer, LoraLayer):
            layer.lora_A, layer.lora_B = ours[name].lora_A, ours[name].lora_B
    with pytest.raises(UserError, match="the adapter that it samples with is not the current one"):
        check(make_engine(recipe, other))


def test_every_part_of_a_dora_adapter_is_trained_saved_and_read_back(make_loop, tmp_path):
    loop = make_loop(dora_recipe())
    before = {name: p.detach().clone() for name, p in loop.policy.trainable().items()}
    loop.step(TrainState())
    unmoved = [name for name, p in loop.policy.trainable().items() if torch.equal(p, before[name])]
    assert not unmoved
    save_adapter(loop.policy, tmp_path)
    digest = adapter_digest(loop)
    resumed = make_loop(dora_recipe())
    load_adapter(resumed.policy, tmp_path)
    assert adapter_digest(resumed) == digest
    # Another command reads the variant from the adapter's own configuration.
    read = load(quantization="nf4", adapter=tmp_path)
    logp = loop.policy.completion_logprobs(BATCH)[0].detach()
    assert torch.equal(read.completion_logprobs(BATCH)[0], logp)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_preflight_counts_the_magnitudes(quantization):
    recipe = dora_recipe(f"model.quantization={quantization}")
    found = load_policy(recipe.model, 0, "cpu")
    predictor = Predictor(recipe, "cpu")
    assert predictor.resident["adapter"] == total_bytes(found.trainable().values())
    assert predictor.resident["adapter"] > Predictor(load_recipe(TINY), "cpu").resident["adapter"]
    assert all(stage.total > 0 for stage in predictor.stages())


def test_a_model_adapter_of_another_variant_is_refused_in_a_sentence(tmp_path):
    save_adapter(load("dora"), tmp_path)
    settings = ModelSettings(name="tiny", quantization="none", lora=LoraSettings(rank=8, alpha=12.0))
    settings = settings.model_copy(update={"adapter": str(tmp_path)})
    with pytest.raises(
        UserError, match=r"is of the variant dora, and model\.lora\.variant = lora: set model\.lora\.var"
    ):
        load_policy(settings, 0, "cpu")
    dora = settings.model_copy(update={"lora": settings.lora.model_copy(update={"variant": "dora"})})
    assert len(load_policy(dora, 0, "cpu").trainable()) == 63


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model.lora.modules_to_save=[lm_head]"],
            "every weight of the base stays frozen, because the head gives no gra",
        ),
        (["model.lora.use_dora=true"], r"here it is model\.lora\.variant=dora"),
    ],
)
def test_what_a_recipe_cannot_ask_of_an_adapter(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        load_recipe(TINY, overrides)


@pytest.mark.slow
def test_dora_on_stacked_experts_is_refused_in_a_sentence(tmp_path):
    save_small_model("mixtral", tmp_path)
    lora = LoraSettings(rank=4, alpha=8.0, variant="dora")
    settings = ModelSettings(name=str(tmp_path), quantization="none", lora=lora)
    with pytest.raises(UserError, match=r"variant = dora does not fit .* its experts are stacked tensors"):
        load_policy(settings, 0, "cpu")
