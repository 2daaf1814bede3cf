"""The decoding step: the same completions as plain `generate`, for every kind of cache and attention."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.model.policy import Policy
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout import decoding, graphs, transformers_engine
from hapo_lite.rollout.cache import SLOTS, in_ring
from hapo_lite.rollout.decoding import bucket
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.generate_engine import GenerateEngine
from hapo_lite.rollout.graphs import recorder_for
from hapo_lite.rollout.inversion import BLOCK, LARGE, draw_token
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 384, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
WINDOW = {"sliding_window": 24}
ARCHITECTURES: dict[str, tuple[PretrainedConfig, str, bool]] = {
    "Qwen2": (Qwen2Config(**SIZES), "sdpa", True),
    "Llama": (LlamaConfig(**SIZES), "sdpa", True),
    "Qwen3": (Qwen3Config(**SIZES, head_dim=8), "sdpa", True),
    "Qwen2, a window in half its layers": (
        Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=2),
        "sdpa",
        True,
    ),
    "Mistral, a window": (MistralConfig(**SIZES, **WINDOW), "sdpa", True),
    "Mistral, a window longer than the rows": (MistralConfig(**SIZES, sliding_window=400), "sdpa", True),
    "Gemma2, a window and no cap": (Gemma2Config(**SIZES, **WINDOW, head_dim=8), "sdpa", True),
    "Gemma2, a window and a cap": (
        Gemma2Config(**SIZES, **WINDOW, head_dim=8, attn_logit_softcapping=2.0),
        "eager",
        False,
    ),
    "Gemma3": (Gemma3TextConfig(**SIZES, **WINDOW, head_dim=8, sliding_window_pattern=2), "sdpa", True),
    "GPT-2, no grouped keys": (
        GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=384, n_positions=512, initializer_range=0.3),
        "sdpa",
        True,
    ),
    "Qwen3-Next, linear attention in some layers": (
        Qwen3NextConfig(
            **{**SIZES, "initializer_range": 0.1},
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "sdpa",
        False,
    ),
}
"""A config, its attention, and whether the cache is allocated once."""
SIGNAL = EntropySignal(pivot=0.5, sigma=1.0, high=2.0, low=4.0)


def policy_of(name: str, dtype: torch.dtype = torch.float32) -> Policy:
    config, attention, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    with warnings.catch_warnings():
        # peft tells of layers that store their weight the other way round, and of experts that it leaves alone.
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, padding_side="left")
    return Policy(model.train(), tokenizer, tuple(range(20, 380, 12)), 512, dtype)


@pytest.fixture(scope="module")
def requests():
    """Rows of prompts whose lengths differ and pass the window, so that padding leaves it."""
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(20, 380, (n,), generator=generator).tolist()) for n in (3, 30, 41, 12)]
    prompts = [EncodedPrompt(i, Prompt(str(i), (("user", ""),), "0"), row) for i, row in enumerate(ids)]
    return [Request(prompt, sample) for prompt in prompts for sample in range(4)]


def written(engine, requests, **truncation):
    processor = AdaptiveTemperature(SIGNAL, 0.9, **truncation)
    return engine.sample(requests, processor, DrawKey(0, Stage.TRAINING, 1))


def alike(ours, theirs, tolerance=2e-5):
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(ours, theirs, strict=True))
    for name in ("sampling_logp", "base_logp", "entropy", "temperature"):
        a, b = (torch.cat([getattr(c, name) for c in completions]) for completions in (ours, theirs))
        assert torch.allclose(a, b, atol=tolerance), (name, float((a - b).abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_writes_what_plain_generate_writes(name, requests):
    policy = policy_of(name)
    engine = TransformersEngine(policy, 16, 40)
    ours = written(engine, requests)
    assert (engine.fixed is True) == ARCHITECTURES[name][2]
    assert len({c.length for c in ours}) > 3
    alike(ours, written(GenerateEngine(policy, 16, 40), requests))
    assert policy.base.config._attn_implementation == ARCHITECTURES[name][1] and policy.model.training


@pytest.mark.parametrize("name", ["Qwen2", "Mistral, a window", "Qwen3-Next, linear attention in some layers"])
def test_what_is_looked_at_rarely_is_the_same(name, requests, monkeypatch):
    policy = policy_of(name)
    each_step = written(TransformersEngine(policy, 16, 40), requests)
    rare = TransformersEngine(policy, 16, 40)
    monkeypatch.setattr(decoding, "looks_of", lambda device: 8)
    alike(written(rare, requests), each_step)
    assert rare.fixed == TransformersEngine(policy, 16, 40).fixed or rare.fixed
    alone = TransformersEngine(policy, 1, 40)
    alike(written(alone, requests[5:7]), each_step[5:7])


def test_a_model_that_passes_on_other_keys_takes_the_old_path(requests):
    policy = policy_of("Llama")
    attention = policy.base.get_decoder().layers[2].self_attn
    forward = attention.forward

    def cloning(*args, past_key_values, **options):
        return forward(*args, past_key_values=_Cloning(past_key_values), **options)

    attention.forward = cloning
    engine = TransformersEngine(policy, 16, 24)
    ours = written(engine, requests)
    assert engine.fixed is False
    alike(ours, written(GenerateEngine(policy_of("Llama"), 16, 24), requests))


class _Cloning:
    """A cache whose keys a model changes before it attends to them."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, *args):
        keys, values = self.cache.update(*args)
        return keys.clone(), values


@pytest.mark.parametrize("truncation", [{"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_truncated_sampling_is_the_same(requests, truncation):
    policy = policy_of("Qwen2")
    ours = written(TransformersEngine(policy, 16, 24), requests, **truncation)
    alike(ours, written(GenerateEngine(policy, 16, 24), requests, **truncation))


def test_buckets():
    assert [bucket(n) for n in range(1, 18)] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20]
    assert all(n <= bucket(n) <= 1.25 * n or bucket(n) == n for n in range(1, 2000))


def test_columns_in_a_ring_by_hand():
    assert in_ring(range(0, 5), 8) == [(range(0, 5), slice(0, 5))]
    assert in_ring(range(6, 13), 8) == [(range(6, 8), slice(6, 8)), (range(8, 13), slice(0, 5))]
    assert in_ring(range(8, 16), 8) == [(range(8, 16), slice(0, 8))]
    assert SLOTS % 8 == 0


class Tracer:
    """Records steps on a CPU as a CUDA graph would: the operators on the tensors they had, and nothing of Python."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, step):
        def traced():
            step()
            return ()

        # Tracing runs the step, which a CUDA graph does not.
        graph = make_fx(traced)()
        self.recorded += 1
        ran = iter([True])

        def replay():
            if not next(ran, False):
                graph()
                self.replayed += 1

        return replay


@pytest.mark.parametrize("name", ["Qwen2", "Gemma3", "Mistral, a window"])
@pytest.mark.parametrize("looks", [1, 8])
def test_recorded_steps_write_the_same(name, looks, requests, monkeypatch):
    policy, tracer = policy_of(name), Tracer()
    plain = written(TransformersEngine(policy, 16, 40), requests)
    monkeypatch.setattr(decoding, "looks_of", lambda device: looks)
    monkeypatch.setattr(transformers_engine, "recorder_for", lambda setting, device: tracer)
    alike(written(TransformersEngine(policy, 16, 40), requests), plain)
    assert tracer.recorded > 1 and tracer.replayed > 1


def test_no_graph_is_recorded_before_it_has_been_measured(monkeypatch):
    monkeypatch.setattr(graphs, "CudaRecorder", lambda: "recorder")
    assert recorder_for("on", torch.device("cuda")) == "recorder" and recorder_for("on", torch.device("cpu")) is None
    for setting in ("auto", "off"):
        assert (
            recorder_for(setting, torch.device("cpu")) is None and recorder_for(setting, torch.device("cuda")) is None
        )


def test_the_old_path_records_nothing(requests, monkeypatch):
    name, tracer = "Qwen3-Next, linear attention in some layers", Tracer()
    monkeypatch.setattr(transformers_engine, "recorder_for", lambda setting, device: tracer)
    written(TransformersEngine(policy_of(name), 16, 8), requests)
    assert tracer.recorded == 0


@pytest.mark.parametrize("vocabulary", [LARGE + BLOCK, LARGE + 5, 50_257])
def test_blocks_draw_what_fp64_draws(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    for spread in (0.5, 1.0, 3.0, 6.0):
        scores = torch.randn(256, vocabulary, generator=generator) * spread
        scores[::3] = scores[::3].masked_fill(scores[::3] < scores[::3].amax(1, keepdim=True) - 3.0, float("-inf"))
        uniform = torch.rand(256, dtype=torch.float64, generator=generator)
        exact = torch.softmax(scores, dim=-1, dtype=torch.float64)
        cumulative = exact.cumsum(dim=-1)
        wanted = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(1)
        ids, logp = draw_token(scores, uniform)
        assert torch.equal(ids, wanted.clamp(max=vocabulary - 1))
        assert torch.allclose(logp.double(), exact.gather(1, ids[:, None]).squeeze(1).log(), atol=2e-6)
        for edge in (0.0, 1.0 - 2.0**-53):
            assert (exact.gather(1, draw_token(scores, torch.full_like(uniform, edge))[0][:, None]) > 0.0).all()
