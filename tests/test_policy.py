"""Loading, quantisation, the CPU trap of bitsandbytes, and scoring against a naive forward pass."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo_lite.errors import UserError
from hapo_lite.model.load import find_stop_ids, load_policy, resolve_dtype
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.model.template import templated
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.records import Completion, EncodedPrompt, Prompt, Sequences
from hapo_lite.runs.interrupt import Interrupted, Interrupts
from hapo_lite.train.memory.live import LiveBytes, tensors_of
from tests.conftest import noisy_adapter


def settings(**changes):
    return ModelSettings(**{"name": "tiny", "lora": LoraSettings(rank=4, alpha=8.0)} | changes)


def completion(prompt_ids, ids, index=0):
    zeros = torch.zeros(len(ids))
    prompt = EncodedPrompt(index, Prompt(str(index), (("user", "?"),), "1"), tuple(prompt_ids))
    return Completion(prompt, 0, torch.tensor(ids), "", False, zeros, zeros, zeros, zeros)


# Pad (0) and stop tokens (2) inside: only lengths may decide what counts.
ROWS = [
    completion([5, 6, 7], [0, 2, 9, 2]),
    completion([8, 0, 3, 4, 11], [30]),
    completion([9], [2, 2, 0, 0, 0, 17, 2]),
]


def naive_logprobs(model, row, temperature):
    ids = torch.tensor([*row.prompt.ids, *row.ids.tolist()])[None]
    start = len(row.prompt.ids) - 1
    logp = (model(input_ids=ids).logits[0, start:-1].double() / temperature).log_softmax(-1)
    return logp.gather(1, row.ids[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completion_logprobs_equal_a_naive_pass_row_by_row(quantization, temperature):
    policy = load_policy(settings(quantization=quantization), 0, "cpu")
    for p in policy.trainable().values():
        torch.nn.init.normal_(p, std=0.05)
    logp, entropy = policy.completion_logprobs(Sequences.of(ROWS), temperature)
    for i, row in enumerate(ROWS):
        expected_logp, expected_entropy = naive_logprobs(policy.model, row, temperature)
        assert torch.allclose(logp[i, : row.length].double(), expected_logp, atol=2e-5)
        assert torch.allclose(entropy[i, : row.length].double(), expected_entropy, atol=2e-5)
        assert not logp[i, row.length :].any() and not entropy[i, row.length :].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_no_gradient(checkpointing):
    policy = load_policy(settings(gradient_checkpointing=checkpointing), 0, "cpu")
    policy.completion_logprobs(Sequences.of(ROWS))[0].sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.trainable().values()])
    plain = load_policy(settings(), 0, "cpu")
    plain.completion_logprobs(Sequences.of(ROWS))[0].sum().backward()
    assert torch.allclose(gradient, torch.cat([p.grad.flatten() for p in plain.trainable().values()]), atol=1e-6)


def test_offloaded_activations_come_back_to_the_last_bit(monkeypatch):
    real, kept = torch.autograd.graph.save_on_cpu, []

    class Watched(real):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: kept.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    gradients = []
    for offload in (False, True):
        policy = load_policy(settings(gradient_checkpointing=True, activation_offload=offload), 0, "cpu")
        for p in policy.trainable().values():
            torch.nn.init.normal_(p, std=0.05)
        policy.completion_logprobs(Sequences.of(ROWS))[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable().values()]))
        assert bool(kept) == offload
    assert torch.equal(*gradients) and gradients[0].any()


def no_biases(tmp_path):
    """A Qwen3-like model: on layers without a bias, training on repacked weights is silently wrong."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=384,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            eos_token_id=2,
        )
    )
    model.save_pretrained(tmp_path / "qwen3")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "qwen3")
    return str(tmp_path / "qwen3")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_generating_first_changes_no_gradient(family, tmp_path):
    """bitsandbytes repacks 4-bit weights at the first evaluation on CPUs with AVX512-BF16, for good."""
    name = "tiny" if family == "qwen2" else no_biases(tmp_path)

    def gradient(generate):
        policy = load_policy(settings(name=name), 0, "cpu")
        if generate:
            with policy.sampling() as model:
                model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
        assert policy.model.training
        policy.completion_logprobs(Sequences.of(ROWS))[0].sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable().values()])

    assert torch.equal(gradient(generate=True), gradient(generate=False))


def test_nf4_is_four_bits_with_double_quantisation_and_the_head_is_left_alone():
    policy = load_policy(settings(), 0, "cpu")
    layer = policy.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 128 * 512 // 2
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    head = policy.model.get_base_model().get_output_embeddings().weight
    assert head.dtype == torch.float32 and not head.requires_grad
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in policy.trainable()}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_adapter_depends_on_the_seed_alone():
    first = load_policy(settings(), 3, "cpu").trainable()
    torch.rand(17)
    again, other = load_policy(settings(), 3, "cpu").trainable(), load_policy(settings(), 4, "cpu").trainable()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_stop_ids_come_from_model_generation_config_tokenizer_and_template():
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    end_of_text, turn_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    # As in Qwen2.5's base models: everything names <|endoftext|>, only the chat template closes with <|im_end|>.
    model.config.eos_token_id = model.generation_config.eos_token_id = end_of_text
    tokenizer.eos_token = "<|endoftext|>"
    assert find_stop_ids(model, tokenizer) == (end_of_text, turn_end)


def test_a_models_own_sampling_settings_are_not_used(tmp_path):
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"top_k": 1, "repetition_penalty": 1.3, "do_sample": True})
    )
    config = load_policy(settings(name=str(tmp_path / "m")), 0, "cpu").model.generation_config
    assert config.top_k is None and config.repetition_penalty is None


def test_dtypes():
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "is not a folder"),
        (lambda folder: folder, "without a config.json"),
        (lambda folder: "no-such-org/no-such-model", "neither a folder here nor a model that the hub gives"),
    ],
)
def test_models_that_are_not_there(tmp_path, make, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a network
    with pytest.raises(UserError, match=message):
        load_policy(settings(name=str(make(tmp_path))), 0, "cpu")


def test_pickled_weights_are_refused(tmp_path):
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(settings(name=str(tmp_path / "m")), 0, "cpu")


def test_unknown_lora_targets_are_named():
    with pytest.raises(UserError, match=r"model\.lora\.targets = \['nope'\]"):
        load_policy(settings(lora=LoraSettings(targets=("nope",))), 0, "cpu")


def test_the_bundled_model_is_small():
    assert sum(f.stat().st_size for f in TINY_MODEL.iterdir()) < 4 * 2**20


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("Cohere", {"logit_scale": 3.0}),
        ("Granite", {"logits_scaling": 0.25}),
        ("Phi", {}),
    ],
)
def test_what_a_family_does_to_its_logits_is_scored(family, changes, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path)
    lora = LoraSettings(rank=4, alpha=8.0)
    policy = load_policy(ModelSettings(name=str(tmp_path), quantization="none", lora=lora), seed=0, device="cpu")
    with policy.sampling() as sampled:
        logp, entropy = policy.completion_logprobs(Sequences.of(ROWS))
        for i, row in enumerate(ROWS):
            expected, expected_entropy = naive_logprobs(sampled, row, 1.0)
            torch.testing.assert_close(logp[i, : row.length].double(), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(entropy[i, : row.length].double(), expected_entropy, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampling_never_copies_the_head(tmp_path, dtype):
    """A linear layer that is given the last position of P prompts copies its weight P times."""
    config = transformers.LlamaConfig(
        vocab_size=20_000, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path)
    policy = load_policy(ModelSettings(name=str(tmp_path), quantization="none", dtype=dtype), 0, "cpu")
    ids, head = torch.ones(3, 9, dtype=torch.long), policy.model.get_base_model().get_output_embeddings().weight
    with policy.sampling() as model, LiveBytes(tensors_of(model)) as live:
        logits = model(input_ids=ids, logits_to_keep=1).logits
    assert logits.dtype == torch.float32 and logits.shape == (3, 1, 20_000)
    assert live.peak - live.now < head.numel() * head.element_size() / 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_sampling_model_computes_what_the_trainer_computes_to_the_last_bit(quantization):
    """On the same shapes; the adapter is where a 16-bit model without autocast would differ."""
    settings = ModelSettings(name="tiny", dtype="bf16", quantization=quantization, lora=LoraSettings(rank=4, alpha=8.0))
    policy = load_policy(settings, 0, "cpu")
    ids = torch.tensor([ROWS[0].prompt.ids + tuple(ROWS[0].ids.tolist())])
    with noisy_adapter(policy, 0.2, 1):
        with policy.autocast(), torch.no_grad():
            expected = policy.hidden_states(ids)
        with policy.sampling() as model:
            found = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(found, expected)


def test_an_adapter_on_the_head_is_refused_since_training_would_leave_it_out():
    lora = LoraSettings(rank=4, alpha=8.0, targets=("q_proj", "lm_head"))
    with pytest.raises(UserError, match=r"model\.lora\.targets = .* does not fit tiny: the head is among them"):
        load_policy(ModelSettings(name="tiny", quantization="none", lora=lora), 0, "cpu")


def test_a_signal_within_a_chat_template_is_no_failure_of_the_template(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **options: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted), Interrupts().listening():
        templated(tokenizer, [{"role": "user", "content": "1 + 1"}])
