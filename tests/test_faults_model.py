"""Models as people bring them: dropout, composite configs, added tokens, layers that are not there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from hapo_lite.errors import UserError, disk_problem
from hapo_lite.model.experts import notes_on_experts
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.model.policy import head_options
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.records import Completion, EncodedPrompt, Prompt, Sequences
from hapo_lite.train.memory.predict import Predictor
from hapo_lite.train.memory.shapes import build, load_config

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def saved(folder, family, **config):
    """A small random model of a family, with the bundled tokenizer."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}LMHeadModel")
    model(getattr(transformers, f"{family}Config")(**config)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    return str(folder)


def loaded(name, **lora):
    settings = ModelSettings(name=name, quantization="none", lora=LoraSettings(**{"rank": 4, "alpha": 8.0} | lora))
    return load_policy(settings, 0, "cpu")


def batch():
    zeros = torch.zeros(6)
    prompt = EncodedPrompt(0, Prompt("0", (("user", "?"),), "1"), (5, 6, 7))
    return Sequences.of([Completion(prompt, 0, torch.tensor([9, 8, 7, 6, 5, 4]), "", False, *[zeros] * 4)])


DROPPING = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "Granite": {"intermediate_size": 64, "num_key_value_heads": 4, "attention_dropout": 0.5},
    "SeedOss": {"intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8, "residual_dropout": 0.5},
    "Mixtral": {"intermediate_size": 64, "num_key_value_heads": 4, "num_local_experts": 4, "router_jitter_noise": 0.5},
    "Phi": {"intermediate_size": 64, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft's, of GPT-2
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # peft's, of experts
@pytest.mark.parametrize("family", DROPPING)
def test_a_base_is_not_random_in_training_mode(family, tmp_path):
    """Otherwise the ratio before the first update is not 1."""
    policy = loaded(saved(tmp_path, family, **SIZES | DROPPING[family]))
    assert policy.model.training
    first, again = (policy.completion_logprobs(batch())[0] for _ in range(2))
    assert torch.equal(first, again)
    policy.model.eval()
    assert torch.equal(first, policy.completion_logprobs(batch())[0])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_proj", "v_prj"],
            r"tiny: it has no layer 'v_prj'; did you mean v_proj\?; its linear layers are down_pr",
        ),
        (["q_proj", "lm_head"], "the head is among them.*take 'lm_head' out of the list"),
        (["q_proj", "embed_tokens"], "the embedding is among them.*take 'embed_tokens' out of the list"),
        (".*(q_proj|lm_head)", "the head or the embedding is among them"),
        (".*embed_tokens", "the head or the embedding is among them"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_target_that_is_no_layer_to_train_is_refused_by_name(targets, message):
    with pytest.raises(UserError, match=message):
        loaded("tiny", targets=targets)
    settings = ModelSettings(name="tiny", lora=LoraSettings(targets=targets))
    with pytest.raises(UserError, match=message):
        build(settings, load_config(settings), torch.float32, torch._subclasses.fake_tensor.FakeTensorMode())


@pytest.mark.parametrize("targets", ["q_proj", "q_proj,v_proj", "self_attn.q_proj", "q_proj, v_proj"])
def test_names_without_brackets_are_a_list_of_names(targets):
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in loaded("tiny", targets=targets).trainable()}
    assert names == ({"q_proj", "v_proj"} if "v_proj" in targets else {"q_proj"})


def test_a_pattern_stays_a_pattern():
    names = {name.split(".lora_")[0] for name in loaded("tiny", targets=r".*\.0\.self_attn\.(q|k)_proj").trainable()}
    assert len(names) == 2


@pytest.mark.parametrize("family", ["Gemma3", "Gemma4"])
def test_soft_cap_and_context_of_a_model_of_several_parts_are_those_of_its_text_part(family):
    text = getattr(transformers, f"{family}TextConfig")(**SIZES, final_logit_softcapping=3.0)
    config = getattr(transformers, f"{family}Config")(text_config=text)

    class Model:
        def __init__(self):
            self.config = config

        def get_output_embeddings(self):
            return torch.nn.Linear(2, 2, bias=False)

    assert head_options(Model())["soft_cap"] == 3.0


def test_the_factor_of_falcon_h1s_head_is_read():
    class Model:
        config = transformers.FalconH1Config(lm_head_multiplier=0.25)

        def get_output_embeddings(self):
            return torch.nn.Linear(2, 2, bias=False)

    assert head_options(Model())["logit_scale"] == 0.25


def grown(folder):
    """The bundled model, with tokens in its tokenizer that its embeddings have no row for."""
    shutil.copytree(TINY_MODEL, folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.add_tokens(["<think>"])
    while len(tokenizer) <= 384:
        tokenizer.add_tokens([f"<more{len(tokenizer)}>"])
    tokenizer.save_pretrained(folder)
    return str(folder), len(tokenizer)


def test_a_token_without_an_embedding_is_named_with_its_id_and_the_size(tmp_path):
    name, size = grown(tmp_path / "m")
    policy = loaded(name)
    rows = policy.base.get_input_embeddings().weight.shape[0]
    if size <= rows:
        pytest.skip("the bundled model has spare rows")
    policy.encode([{"role": "user", "content": "1+1=?"}])  # without such a token all is well
    with pytest.raises(UserError, match=rf"'<more{size - 1}>' as {size - 1}, and the model has embeddings for 0 to"):
        policy.encode([{"role": "user", "content": f"<more{size - 1}>"}])


def test_a_padding_token_without_an_embedding_is_replaced(tmp_path):
    name, _ = grown(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    tokenizer = AutoTokenizer.from_pretrained(name)
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"pad_token": tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)})
    )
    policy = loaded(name)
    assert policy.tokenizer.pad_token_id < policy.base.get_input_embeddings().weight.shape[0]


def test_an_adapters_folder_as_a_model_is_answered_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B"}))
    with pytest.raises(UserError, match=r"is an adapter: give the model .*, model\.name=Qwen/Qwen3-8B; .*--adapter"):
        loaded(str(tmp_path))


def test_flash_attention_that_is_not_installed_is_not_taken_for_a_missing_model():
    settings = ModelSettings(name="tiny", quantization="none", dtype="bf16", attention="flash_attention_2")
    with pytest.raises(UserError, match=r"model\.attention = flash_attention_2 cannot be used .*model\.attention=sdpa"):
        load_policy(settings, 0, "cpu")


MIXTRAL = SIZES | {"intermediate_size": 64, "num_key_value_heads": 4, "num_local_experts": 4}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # peft's, of experts
@pytest.mark.parametrize(
    ("targets", "words"), [("all-linear", "with adapters on down_proj, gate_up_proj"), (["q_proj"], "without adapters")]
)
def test_it_is_said_which_experts_have_adapters_and_that_they_are_not_in_4_bits(targets, words, tmp_path):
    name = saved(tmp_path, "Mixtral", **MIXTRAL)
    settings = ModelSettings(name=name, lora=LoraSettings(rank=4, alpha=8.0, targets=targets))
    [note] = notes_on_experts(load_policy(settings, 0, "cpu").model)
    assert "the experts, 0.05 M of the weights," in note
    assert note.endswith(f"they are in float32, not in 4 bits, {words}")
    assert notes_on_experts(loaded("tiny").model) == []


HYBRIDS = {
    "Lfm2": {"intermediate_size": 64, "num_key_value_heads": 4, "layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybrid": {
        "intermediate_size": 64,
        "shared_intermediate_size": 64,
        "num_key_value_heads": 4,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "num_local_experts": 0,
    },
    "MiniCPM3": {
        "intermediate_size": 64,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_memory_of_a_model_with_another_cache_is_predicted(family, tmp_path, make_recipe):
    name = saved(tmp_path / "m", family, **SIZES | HYBRIDS[family])
    stages = Predictor(make_recipe(f"model.name={name}"), "cpu").stages()
    assert [stage.name for stage in stages] == ["rollout", "scoring", "update"]
    assert 0 < stages[0].parts["KV cache"] < stages[0].total


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: unknown error")],
)
def test_what_a_card_lacks_is_no_fault_of_a_model_that_brings_code(monkeypatch, error):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", failing)
    for trust in (False, True):
        with pytest.raises(type(error), match="CUDA"):
            load_policy(ModelSettings(name="tiny", trust_remote_code=trust), 0, "cpu")


@pytest.mark.parametrize("error", [OSError(), OSError("no number"), PermissionError(13, "Permission denied")])
def test_an_error_of_the_disk_is_a_clause_whatever_its_text(error):
    assert disk_problem(error).endswith("; check the folder and run the same command again")
