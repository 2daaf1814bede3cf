"""The inspector's own generation: it streams, equals algo/, ends at its limits and takes an adapter."""

from __future__ import annotations

import pytest
import torch

from hapo_lite.algo.methods import PRESETS
from hapo_lite.errors import UserError
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.inspect.tokens import token_table
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def policy():
    return ModelShelf().get("tiny")


def last(policy, **settings):
    *_, progress = generate(policy, GenerationSettings("3+4*5=?", **settings))
    return progress


def test_a_generation_streams_and_equals_algo(policy):
    progress = last(policy, seed=1)
    trace = progress.trace
    assert progress.ended == "ended by itself" and trace.text
    signal = trace.sampling_signal
    entropy = torch.tensor(trace.tokens["entropy"])
    expected = 1.0 + 0.05 * signal.normalize(entropy)
    assert torch.allclose(torch.tensor(trace.tokens["temperature"]), expected)
    first = trace.tokens["alternatives"][0]
    assert len(first) == 10 and first[0][1] >= first[1][1] and sum(p for _, p, _ in first) <= 1.0 + 1e-9
    h = token_table(trace, tokenizer=policy.tokenizer).numbers["h"]
    assert h == signal.normalize(entropy).tolist()


def test_without_hapo_there_is_one_pass_at_one_temperature(policy):
    items = list(generate(policy, GenerationSettings("3+4*5=?", method=PRESETS["dapo"], temperature=0.7)))
    assert not any(item.first_pass for item in items)
    assert items[-1].trace.tokens["temperature"] == pytest.approx([0.7] * len(items))


@pytest.mark.parametrize("preset", ["hapo", "dapo"])
def test_it_writes_what_the_engine_samples(policy, preset):
    method = PRESETS[preset]
    trace = last(policy, method=method, seed=5, temperature=1.3).trace
    prompt = Prompt("p", (("user", "3+4*5=?"),), "23")
    request = Request(EncodedPrompt(0, prompt, tuple(policy.encode(prompt.chat()))), sample=0)
    processor = AdaptiveTemperature(trace.sampling_signal, 1.3, method.tau)
    engine = TransformersEngine(policy, batch_size=4, max_new_tokens=240)
    [completion] = engine.sample([request], processor, DrawKey(5, Stage.TRAINING, 0))
    assert trace.tokens["id"] == completion.ids.tolist() and trace.text == completion.text
    for name, values in {"entropy": completion.entropy, "temperature": completion.temperature}.items():
        assert trace.tokens[name] == values.double().tolist()
    assert trace.tokens["logp_base"] == pytest.approx(completion.base_logp.tolist(), abs=1e-5)
    assert trace.tokens["logp_sampling"] == pytest.approx(completion.sampling_logp.tolist(), abs=1e-5)


def test_limits_end_a_generation(policy):
    assert last(policy, max_new_tokens=3).ended == "cut off at the token limit"
    assert "time limit" in last(policy, seconds=1e-9).ended
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 10**6}, {"seconds": 1e9}, {"temperature": 0.0}):
        with pytest.raises(UserError):
            GenerationSettings("1+1", **wrong)
    with pytest.raises(UserError, match="tokens; the model takes 256"):
        last_of_long = GenerationSettings("1+1 " * 300)
        list(generate(policy, last_of_long))


def test_an_adapter_is_loaded_and_its_absence_named(policy, tmp_path):
    with torch.no_grad():
        saved = ModelShelf().get("tiny")
        for name, parameter in saved.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    saved.model.save_pretrained(tmp_path / "adapter")
    moved = last(ModelShelf().get("tiny", str(tmp_path / "adapter")), max_new_tokens=1).trace
    assert moved.tokens["entropy"] != last(policy, max_new_tokens=1).trace.tokens["entropy"]
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        ModelShelf().get("tiny", str(tmp_path))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="does not fit"):
        ModelShelf().get("tiny", str(tmp_path / "adapter"))
