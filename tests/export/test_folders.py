"""What the three kinds of exports hold, and what reads them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from hapo_lite.cli import run_command
from hapo_lite.export import __main__ as command
from hapo_lite.export.gguf import problems_of
from hapo_lite.export.merge import readable_config, readable_tokenizer
from hapo_lite.model.origins import TINY_MODEL
from tests.export.command import WEIGHTS


def test_what_a_merged_folder_holds(merged):
    assert {p.name for p in merged.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with safe_open(merged / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}
    with safe_open(TINY_MODEL / "model.safetensors", "pt") as tensors:
        assert names == set(tensors.keys())  # the head is tied, and nothing of the adapter is left
    config = AutoConfig.from_pretrained(merged)
    assert config.tie_word_embeddings and config.dtype == torch.bfloat16
    assert set(json.loads((merged / "generation_config.json").read_text())["eos_token_id"]) == {0, 2}
    ours, theirs = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(TINY_MODEL)
    chat = [{"role": "user", "content": "What is (3 + 4) x 5?"}]
    assert ours.apply_chat_template(chat)["input_ids"] == theirs.apply_chat_template(chat)["input_ids"]
    assert ours.eos_token == theirs.eos_token and ours.all_special_ids == theirs.all_special_ids


def test_gguf_ready_is_read_by_both_generations_of_transformers(finished):
    assert run_command(command.main, [str(finished), "--to", "gguf-ready"]) == 0
    folder = finished / "export" / "gguf-ready"
    assert problems_of(folder) == []
    config = json.loads((folder / "config.json").read_text())
    # The converter reads config.json through transformers 4, which takes rope_theta from the top level alone.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16" and config["tie_word_embeddings"] is True
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # the one that version 4 has
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    assert (folder / "tokenizer.json").read_bytes() == (TINY_MODEL / "tokenizer.json").read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == (TINY_MODEL / "chat_template.jinja").read_bytes()
    card = (folder / "README.md").read_text()
    assert f"python convert_hf_to_gguf.py {folder} --outfile tiny_cpu.gguf --outtype auto" in card


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("config.json", {"tie_word_embeddings": False}, "there is no lm_head.weight"),
        ("config.json", {"vocab_size": 300}, "the tokenizer has id 321 and vocab_size is 300"),
        ("config.json", {"architectures": None}, "does not name one architecture"),
        ("config.json", {"quantization_config": {}}, "says that the weights are quantised"),
        ("config.json", {"rope_theta": None}, "where only transformers 5 reads it"),
        ("config.json", {"eos_token_id": [2, 0]}, "names one end-of-sequence token"),
    ],
)
def test_what_the_converter_would_stumble_over_is_named(merged, tmp_path, file, change, problem):
    shutil.copytree(merged, tmp_path / "m")
    for path, changed in ((tmp_path / "m" / file, change), (tmp_path / "m" / "tokenizer_config.json", {})):
        fields = json.loads(path.read_text()) | changed
        if "eos_token_id" in change:
            fields.pop("eos_token", None)
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    assert any(problem in found for found in problems_of(tmp_path / "m")), problems_of(tmp_path / "m")


def test_a_base_in_the_words_of_transformers_4_keeps_them():
    older = {"rope_theta": 1e6, "torch_dtype": "bfloat16", "tie_word_embeddings": True, "eos_token_id": 7}
    assert readable_config(older, torch.float16) == older | {"dtype": "float16", "torch_dtype": "float16"}
    scaled = readable_config(
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}}, torch.float16
    )
    assert scaled["rope_theta"] == 1e6 and scaled["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    tokenizer = {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_end|>"], "eos_token": "x"}
    assert readable_tokenizer(tokenizer) == tokenizer


def python_of(card: Path) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)
    return code


def test_the_adapter_loads_and_answers_as_its_card_says(finished, adapter, monkeypatch, capsys):
    code = python_of(adapter / "README.md")
    assert len([line for line in code.splitlines() if "from_pretrained" in line]) == 3
    monkeypatch.chdir(adapter)
    names: dict = {}
    exec(code, names)
    printed = capsys.readouterr().out
    asked, count = names["ids"]["input_ids"], names["completion"].shape[1]

    assert "9*7+4=?" in names["tokenizer"].decode(asked[0])
    assert asked.shape[1] < count <= asked.shape[1] + 32 and "9*7" in printed
    trained = load_file(finished / "adapter" / WEIGHTS)
    loaded = {k.replace(".default", ""): v for k, v in names["model"].state_dict().items() if "lora_" in k}
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[k].float(), trained[k]) for k in trained)
    assert names["tokenizer"].chat_template is not None
    by_name = AutoPeftModelForCausalLM.from_pretrained(adapter)  # through base_model_name_or_path
    assert by_name.peft_config["default"].base_model_name_or_path == str(TINY_MODEL)


@pytest.mark.parametrize("asked", ["4a83ca6", "main", None])
def test_an_adapter_names_its_base_on_the_hub_and_the_revision(run, monkeypatch, asked):
    """The commit that the run found behind the name and the branch, or else the recipe's revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= {"name": "Qwen/Qwen2.5-Math-1.5B", "revision": asked}
    summary = json.loads((run / "summary.json").read_text())
    summary["origins"]["model"] = "files of a folder" if asked == "4a83ca6" else "commit 4a83ca6"
    (run / "summary.json").write_text(json.dumps(summary))
    recipe["data"] |= {"source": "BytedTsinghua-SIA/DAPO-Math-17k", "revision": "abc"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/somewhere/else"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert run_command(command.main, [str(run), "--to", "adapter", "--output", str(run / "out")]) == 0
    written = json.loads((run / "out" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("Qwen/Qwen2.5-Math-1.5B", "4a83ca6")
    card = (run / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-Math-1.5B" and front["library_name"] == "peft"
    assert front["datasets"] == ["BytedTsinghua-SIA/DAPO-Math-17k"] and "hapo" in front["tags"]
    assert 'from_pretrained("Qwen/Qwen2.5-Math-1.5B", revision="4a83ca6"' in card
    assert "BytedTsinghua-SIA/DAPO-Math-17k (split train, revision abc)" in card


def test_the_card_tells_what_the_run_was(finished, merged):
    card = (merged / "README.md").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    for told in (
        summary["adapter_sha256"],
        summary["verdict"]["sentence"],
        f"{summary['sampled_tokens']:,} tokens sampled",
        f"torch {torch.__version__}",
        "| seed | 0 |",
    ):
        assert told in card
    before, after = (summary["evaluation"][when]["eval/accuracy"] for when in ("before", "after"))
    assert re.search(rf"held-out accuracy, avg@2 +{before:.3f} +{after:.3f}\n", card)
    [recipe] = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    assert yaml.safe_load(recipe) == yaml.safe_load((finished / "recipe.yaml").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front  # the bundled model is on no hub
