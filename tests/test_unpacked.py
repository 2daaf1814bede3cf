"""The dense copy of a 4-bit base: the same numbers to the last bit, made where it fits, and gone afterwards."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect.generate import GenerationSettings, generate
from hapo_lite.model import unpacked
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import ModelSettings, load_recipe
from hapo_lite.records import EncodedPrompt, Prompt, Request, Sequences
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.memory.predict import Predictor
from hapo_lite.train.memory.room import unpacks
from tests.conftest import TINY, noisy_adapter

CPU = torch.device("cpu")
REQUESTS = [
    Request(EncodedPrompt(i, Prompt(str(i), (), ""), tuple(range(3, 7 + i))), sample)
    for i in range(3)
    for sample in range(2)
]


def load(dtype="fp32", wanted=None):
    return load_policy(ModelSettings(name="tiny", dtype=dtype), 0, "cpu", unpacked=wanted)


def written(policy):
    return TransformersEngine(policy, 4, 12).sample(REQUESTS, AdaptiveTemperature(None), DrawKey(1, Stage.TRAINING, 0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampling_and_scoring_are_those_of_the_packed_base_to_the_last_bit(dtype):
    packed, dense = load(dtype, wanted=False), load(dtype, wanted=True)
    with noisy_adapter(packed, 0.05, 1), noisy_adapter(dense, 0.05, 1):
        pairs = list(zip(written(packed), written(dense), strict=True))
        for a, b in pairs:
            for name in ("ids", "base_logp", "sampling_logp", "entropy"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
        batch = Sequences.of([a for a, _ in pairs])
        with dense.unpacked():
            unpacked_logp, _ = dense.completion_logprobs(batch)
        assert torch.equal(packed.completion_logprobs(batch)[0], unpacked_logp)


def test_it_is_used_while_it_is_held_and_gone_afterwards(monkeypatch):
    made = []
    unpack = unpacked.unpack

    def noted(layer, dtype):
        made.append(weakref.ref(weight := unpack(layer, dtype)))
        return weight

    monkeypatch.setattr(unpacked, "unpack", noted)
    policy = load(wanted=True)
    layers = policy.dense._layers
    with policy.unpacked():
        written(policy)
        with policy.unpacked():
            written(policy)
        assert len(made) == len(layers) > 0 and all(weight() is not None for weight in made)
    gc.collect()
    assert all(weight() is None for weight in made)
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_generation_of_the_inspector_unpacks_once_and_gives_the_memory_back(monkeypatch):
    made = []
    unpack = unpacked.unpack
    monkeypatch.setattr(unpacked, "unpack", lambda layer, dtype: made.append(layer) or unpack(layer, dtype))
    policy = load(wanted=True)
    steps = generate(policy, GenerationSettings("1 + 2 = ?", max_new_tokens=6))
    assert sum(1 for _ in steps) > 3 and len(made) == len(policy.dense._layers)
    cancelled = generate(policy, GenerationSettings("1 + 2 = ?", max_new_tokens=6))
    next(cancelled)
    cancelled.close()
    assert not any("forward" in vars(layer) for layer in policy.dense._layers)


def test_gradients_afterwards_are_those_of_a_model_that_never_sampled():
    plain, used = load(wanted=False), load(wanted=True)
    batch = Sequences.of(written(used))
    for policy in (plain, used):
        policy.completion_logprobs(batch)[0].sum().backward()
    for (name, a), b in zip(plain.trainable().items(), used.trainable().values(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_ratio_is_one_to_the_last_bit_before_the_first_update(make_loop, make_recipe):
    recipe = make_recipe("rollout.unpacked_base=always", "training.updates_per_iteration=1", "training.iterations=1")
    loop = make_loop(recipe)
    assert loop.policy.dense is not None
    loop.policy.dense.wanted = True
    _, _, traces = loop.step(TrainState())
    ratios = [ratio for trace in traces for ratio in trace.tokens["ratio"]]
    assert len(ratios) > 20 and set(ratios) == {1.0}


@pytest.mark.parametrize(("times", "made"), [(1.99, 0), (2.0, 1)])
def test_left_open_it_is_made_where_twice_its_size_is_free(monkeypatch, times, made):
    policy = load()
    size = sum(layer.in_features * layer.out_features * 4 for layer in policy.dense._layers)
    free = SimpleNamespace(available=int(times * size))
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with policy.unpacked():
        assert sum("forward" in vars(layer) for layer in policy.dense._layers) == made * len(policy.dense._layers)


def test_where_memory_runs_out_on_the_way_the_packed_layers_go_on(monkeypatch):
    def short(layer, dtype):
        raise torch.OutOfMemoryError("1 GiB were asked for")

    expected = written(load(wanted=False))
    monkeypatch.setattr(unpacked, "unpack", short)
    for a, b in zip(expected, written(load(wanted=None)), strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.base_logp, b.base_logp)
    with pytest.raises(UserError, match=r"rollout\.unpacked_base = always takes .* GiB, which are not free: use auto"):
        written(load(wanted=True))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["rollout.unpacked_base=always"], True),
        (["rollout.unpacked_base=never"], False),
        (["rollout.unpacked_base=always", "model.quantization=none"], False),
        (["rollout.unpacked_base=always", "rollout.engine=vllm"], False),
    ],
)
def test_what_a_recipe_asks_for(overrides, expected):
    assert unpacks(load_recipe(TINY, overrides), CPU) is expected


@pytest.mark.parametrize(("spare", "made"), [(1.2, True), (0.8, False)])
def test_on_a_gpu_the_prediction_decides(monkeypatch, spare, made):
    """Whether it fits beside the rollout's peak, in what a card leaves for tensors."""
    recipe = load_recipe(TINY)
    predictor = Predictor(recipe, "cuda")
    room = predictor.stages()[0].total + int(spare * predictor.unpacked)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=room))
    monkeypatch.setattr("hapo_lite.train.memory.room.usable", lambda card: card)
    assert unpacks(recipe, torch.device("cuda")) is made


def test_preflight_counts_it():
    recipe = load_recipe(TINY, ["rollout.unpacked_base=always"])
    rollout, scoring, update = Predictor(recipe, "cpu").stages()
    exact = load().dense.size
    assert rollout.parts["unpacked base"] == scoring.parts["unpacked base"] == exact > 0
    assert "unpacked base" not in update.parts
    assert "unpacked base" not in Predictor(recipe, "cuda").stages()[1].parts
    assert "unpacked base" not in Predictor(load_recipe(TINY), "cpu").stages(room=exact)[0].parts
