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
from hapo_lite.model.unpacked import Unpacking
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


def load(dtype="fp32", wanted=Unpacking.IF_FREE):
    return load_policy(ModelSettings(name="tiny", dtype=dtype), 0, "cpu", unpacked=wanted)


def written(policy):
    return TransformersEngine(policy, 4, 12).sample(REQUESTS, AdaptiveTemperature(None), DrawKey(1, Stage.TRAINING, 0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampling_and_scoring_are_those_of_the_packed_base_to_the_last_bit(dtype):
    packed, dense = load(dtype, wanted=Unpacking.NEVER), load(dtype, wanted=Unpacking.ALWAYS)
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
    policy = load(wanted=Unpacking.ALWAYS)
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
    policy = load(wanted=Unpacking.ALWAYS)
    steps = generate(policy, GenerationSettings("1 + 2 = ?", max_new_tokens=6))
    assert sum(1 for _ in steps) > 3 and len(made) == len(policy.dense._layers)
    cancelled = generate(policy, GenerationSettings("1 + 2 = ?", max_new_tokens=6))
    next(cancelled)
    cancelled.close()
    assert not any("forward" in vars(layer) for layer in policy.dense._layers)


def test_gradients_afterwards_are_those_of_a_model_that_never_sampled():
    plain, used = load(wanted=Unpacking.NEVER), load(wanted=Unpacking.ALWAYS)
    batch = Sequences.of(written(used))
    for policy in (plain, used):
        policy.completion_logprobs(batch)[0].sum().backward()
    for (name, a), b in zip(plain.trainable().items(), used.trainable().values(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_ratio_is_one_to_the_last_bit_before_the_first_update(make_loop, make_recipe):
    recipe = make_recipe("rollout.unpacked_base=always", "training.updates_per_iteration=1", "training.iterations=1")
    loop = make_loop(recipe)
    assert loop.policy.dense is not None
    loop.policy.dense.wanted = Unpacking.ALWAYS
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


@pytest.mark.parametrize("wanted", [Unpacking.IF_FREE, Unpacking.DECIDED])
def test_where_memory_runs_out_on_the_way_the_packed_layers_go_on(monkeypatch, capsys, wanted):
    """For good, with one note; a recipe that asks for the copy is told so."""
    asked = []

    def short(layer, dtype):
        asked.append(layer)
        raise torch.OutOfMemoryError("1 GiB were asked for")

    expected = written(load(wanted=Unpacking.NEVER))
    monkeypatch.setattr(unpacked, "unpack", short)
    policy = load(wanted=wanted)
    for a, b in [*zip(expected, written(policy), strict=True), *zip(expected, written(policy), strict=True)]:
        assert torch.equal(a.ids, b.ids) and torch.equal(a.base_logp, b.base_logp)
    assert len(asked) == 1 and policy.dense.given_up and policy.dense.wanted is Unpacking.NEVER
    told = "note: memory ran out while the 4-bit base was unpacked (1 GiB were asked for): it stays packed from now on"
    assert capsys.readouterr().out == f"{told}, as with rollout.unpacked_base=never\n"
    with pytest.raises(UserError, match=r"rollout\.unpacked_base = always takes .* GiB, which are not free: use auto"):
        written(load(wanted=Unpacking.ALWAYS))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Unpacking.IF_FREE),
        (["rollout.unpacked_base=always"], Unpacking.ALWAYS),
        (["rollout.unpacked_base=never"], Unpacking.NEVER),
        (["rollout.unpacked_base=always", "model.quantization=none"], Unpacking.NEVER),
        (["rollout.unpacked_base=always", "rollout.engine=vllm"], Unpacking.NEVER),
    ],
)
def test_what_a_recipe_asks_for(overrides, expected):
    assert unpacks(load_recipe(TINY, overrides), CPU) is expected


@pytest.mark.parametrize(("spare", "decided"), [(1.2, Unpacking.DECIDED), (0.8, Unpacking.NEVER)])
def test_on_a_gpu_the_prediction_decides(monkeypatch, spare, decided):
    """Whether it fits beside the rollout's peak, in what a card leaves for tensors. What the recipe asks for stays."""
    recipe = load_recipe(TINY)
    predictor = Predictor(recipe, "cuda")
    room = predictor.stages()[0].total + int(spare * predictor.unpacked)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=room))
    monkeypatch.setattr("hapo_lite.train.memory.room.usable", lambda card: card)
    card = torch.device("cuda")
    assert unpacks(recipe, card) is decided
    assert unpacks(load_recipe(TINY, ["rollout.unpacked_base=always"]), card) is Unpacking.ALWAYS
    assert unpacks(load_recipe(TINY, ["rollout.unpacked_base=never"]), card) is Unpacking.NEVER


def test_preflight_counts_it():
    recipe = load_recipe(TINY, ["rollout.unpacked_base=always"])
    rollout, scoring, update = Predictor(recipe, "cpu").stages()
    exact = load().dense.size
    assert rollout.parts["unpacked base"] == scoring.parts["unpacked base"] == exact > 0
    assert "unpacked base" not in update.parts
    assert "unpacked base" not in Predictor(recipe, "cuda").stages()[1].parts
    assert "unpacked base" not in Predictor(load_recipe(TINY), "cpu").stages(room=exact)[0].parts
