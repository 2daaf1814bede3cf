"""A batch that is looked at while it is written: the same completions, and a model that is free in between."""

from __future__ import annotations

import pytest
import torch

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import ModelSettings
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine, Watch

KEY = DrawKey(3, Stage.BENCHMARK, 0)
PROCESSOR = AdaptiveTemperature(EntropySignal(pivot=-1.0, sigma=1.0, high=1.0, low=3.0), 1.0, tau=0.5)


@pytest.fixture(autouse=True)
def look_at_every_token(monkeypatch):
    monkeypatch.setattr("hapo_lite.rollout.transformers_engine.PREPARING", 0)


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelSettings(name="tiny"), 0, "cpu")


def requests(policy) -> list[Request]:
    prompts = [Prompt(text, (("user", text),), "") for text in ("3+4*5=?", "12+3*9=?")]
    encoded = [EncodedPrompt(i, prompt, tuple(policy.encode(prompt.chat()))) for i, prompt in enumerate(prompts)]
    return [Request(prompt, sample) for sample in range(3) for prompt in encoded]


def test_a_watched_batch_is_what_the_engine_samples(policy):
    engine = TransformersEngine(policy, batch_size=8, max_new_tokens=40)
    expected = engine.sample(requests(policy), PROCESSOR, KEY)
    batches = engine.stream(requests(policy), PROCESSOR, KEY, Watch(seconds=0.0))
    looks = 0
    for batch in batches:
        looks += 1
        for length, stopped, completion in zip(*batch.ends(), expected, strict=True):
            assert not stopped or length == completion.length
    written = batch.completions()
    assert looks == max(c.length for c in expected)
    for one, other in zip(written, expected, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.text == other.text
        assert one.truncated == other.truncated
        assert torch.equal(one.sampling_logp, other.sampling_logp) and torch.equal(one.entropy, other.entropy)


def test_between_two_looks_the_model_is_as_it_was(policy):
    engine = TransformersEngine(policy, batch_size=8, max_new_tokens=40)
    [request, *_] = requests(policy)
    head = policy.base.get_output_embeddings()
    attention = policy.base.config.get_text_config()._attn_implementation
    streams = [engine.stream([request], PROCESSOR, KEY, Watch(seconds=0.0)) for _ in range(2)]
    for one, other in zip(*streams, strict=True):
        # Two streams of one model take turns.
        assert torch.equal(one.transcript.ids, other.transcript.ids)
        assert torch.is_grad_enabled() and policy.model.training and "forward" not in vars(head)
        assert policy.base.config.get_text_config()._attn_implementation == attention
