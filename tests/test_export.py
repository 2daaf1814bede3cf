"""Exports of a real run: what they hold, that they are the trained model, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.export import __main__ as command
from hapo_lite.export import probes
from hapo_lite.export.gguf import problems_of
from hapo_lite.export.merge import DTYPES, placement, readable_config, readable_tokenizer
from hapo_lite.export.parity import Drift
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.runs.checkpoint import file_hash
from hapo_lite.runs.files import replacing_folder
from hapo_lite.runs.trace import read_traces
from hapo_lite.train import __main__ as train
from tests.conftest import TINY

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four iterations at a learning rate that shows."""
    folder = tmp_path_factory.mktemp("export")
    settings = [
        f"output_dir={folder}",
        "rollout.prompts_per_iteration=4",
        "rollout.completions_per_prompt=4",
        "training.iterations=4",
        "training.learning_rate=0.002",
        "training.warmup_updates=0",
        "evaluation.prompts=4",
        "evaluation.samples=2",
        "reward.workers=1",
        "logging.progress=false",
    ]
    assert run_command(train.main, [str(TINY), *settings]) == 0
    return folder / "tiny_cpu"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """The run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "tiny_cpu", ignore=shutil.ignore_patterns("export")))


@pytest.fixture(scope="module")
def merged(finished) -> Path:
    assert run_command(command.main, [str(finished), "--to", "merged"]) == 0
    return finished / "export" / "merged"


@pytest.fixture(scope="module")
def adapter(finished) -> Path:
    assert run_command(command.main, [str(finished), "--to", "adapter"]) == 0
    return finished / "export" / "adapter"


def complaint(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run_command(command.main, [str(a) for a in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def scored(model, tokenizer, run: Path) -> torch.Tensor:
    """Log-probabilities of the last traces' completions, by plain transformers."""
    rows = []
    for trace in read_traces(sorted((run / "traces").iterdir())[-1]):
        chat = [{"role": role, "content": content} for role, content in trace.messages]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
        ids = torch.tensor(trace.tokens["id"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    return torch.cat(rows)


def test_the_merged_model_is_the_adapter_on_its_base_without_peft(finished, merged):
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    alone = scored(base, tokenizer, finished)
    trained = scored(PeftModel.from_pretrained(base, finished / "adapter"), tokenizer, finished)
    written = scored(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), tokenizer, finished)
    effect, drift = (alone - trained).abs().mean(), (written - trained).abs().mean()
    assert effect > 0.02 and drift < 2e-3
    found = json.loads((merged / "export.json").read_text())["drift"]
    assert found["effect"] > 0.02 and 0 < found["mean"] < 2e-3
    assert found["same"] + found["ties"] == 8 and found["other"] == 0  # a tie may go either way
    gap = json.loads((merged / "export.json").read_text())["four_bit"]
    assert gap["tokens"] == found["tokens"] and found["mean"] < gap["mean"] < 0.2


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


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_merge_at_the_wrong_scale_is_refused(run, capsys, monkeypatch, factor):
    unload = LoraModel.merge_and_unload

    def wrong(model, **options):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: factor * scale for name, scale in module.scaling.items()}
        return unload(model, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    line = complaint(capsys, run, "--to", "merged")
    assert re.search(r"the merged model is [\d.]+ nats a token from the adapter on its base \(0\.\d+ allowed", line)
    assert not list((run / "export").iterdir())


def test_an_adapter_on_a_tied_head_cannot_be_merged_unnoticed(run, capsys):
    """Merged into lm_head, it changes the embeddings too, which are the same tensor: another model than was trained."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(run / "head", save_embedding_layers=False)
    line = complaint(capsys, run, "--to", "merged", "--adapter", run / "head")
    assert "it is not the model that was trained; use --to adapter" in line


def test_an_adapter_below_the_rounding_is_merged_in_fp32_only(run, capsys):
    weights = load_file(run / "adapter" / WEIGHTS)
    set_model(run, quantization="none")
    shutil.copytree(run / "adapter", run / "faint")
    save_file({name: w * (1e-3 if "lora_B" in name else 1.0) for name, w in weights.items()}, run / "faint" / WEIGHTS)
    line = complaint(capsys, run, "--to", "merged", "--adapter", run / "faint")
    assert "the adapter changes less than rounding to bfloat16 does" in line and "--dtype fp32" in line
    arguments = [str(run), "--to", "merged", "--adapter", str(run / "faint"), "--dtype", "fp32"]
    assert run_command(command.main, arguments) == 0
    with safe_open(run / "export" / "merged" / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118
    assert AutoConfig.from_pretrained(run / "export" / "merged").dtype == torch.float32
    assert json.loads((run / "export" / "merged" / "export.json").read_text())["four_bit"] is None


def test_it_is_computed_in_fp32_on_weights_of_16_bits():
    """To what a model in fp32 gives; bf16 throughout is a hundred times further away. The weights stay as they are."""
    texts = [((5, 6, 7), (9, 30, 2)), ((8,), (3, 4, 11, 40, 2))]
    found = {}
    for dtype, widened in (("fp32", False), ("bf16", True), ("bf16", False)):
        settings = ModelSettings(name="tiny", quantization="none", dtype=dtype, lora=LoraSettings(rank=4, alpha=8.0))
        policy = load_policy(settings, 0, "cpu")
        if widened:
            policy = probes.compute_in_fp32(policy)
        found[dtype, widened] = probes.logprobs(policy, texts)
        weights = {p.dtype for name, p in policy.model.named_parameters() if "lora_" not in name}
        assert weights == {DTYPES[dtype]}
    exact = found["fp32", False]
    assert len(exact) == 8 and (found["bf16", True] - exact).abs().max() < 1e-5
    assert (found["bf16", False] - exact).abs().max() > 1e-3


def test_where_it_is_merged(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1_300_000}))
    assert placement(1_000_000) == torch.device("cpu")
    with pytest.raises(UserError, match=r"merging takes 0\.0014 GB of memory and 0\.0013 GB are free"):
        placement(1_050_000)


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"mean": 0.01, "effect": 0.1}, None),
        ({"mean": 0.021, "effect": 0.1}, "it is not the model"),  # 0.02 is allowed in bf16
        ({"mean": 0.019, "effect": 0.07}, "less than rounding"),  # a quarter of 0.07 is 0.0175
        ({"mean": 0.0, "effect": 0.0}, None),  # an adapter that changes nothing
        ({"mean": float("nan"), "effect": 0.1}, "it is not the model"),
        ({"mean": 0.01, "effect": 0.1, "other": 1}, "and 1 differ"),
        ({"mean": 0.01, "effect": 0.1, "ties": 3}, None),
    ],
)
def test_what_counts_as_drift(numbers, problem):
    given = {"largest": 0.1, "tolerance": 0.02, "same": 5, "ties": 0, "other": 0, "tokens": 100} | numbers
    found = Drift(dtype="bfloat16", **given).problem()
    assert (found is None) if problem is None else (problem in found)
    if problem == "it is not the model":
        assert "or --dtype fp32 if rounding to bfloat16 made it so" in found
        assert "--dtype" not in Drift(dtype="float32", **given).problem()


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


def test_the_adapter_loads_as_its_card_says(finished, adapter, monkeypatch):
    code = python_of(adapter / "README.md")
    assert len([line for line in code.splitlines() if "from_pretrained" in line]) == 3
    monkeypatch.chdir(adapter)
    names: dict = {}
    exec(code, names)
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


def test_only_its_own_folder_is_written_anew(finished, adapter, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for other in (tmp_path / "mine", finished, finished / "adapter", TINY_MODEL):
        line = complaint(capsys, finished, "--to", "adapter", "--output", other)
        assert f"{other} is there already and is no adapter export of tiny_cpu" in line
    assert "no merged export" in complaint(capsys, finished, "--to", "merged", "--output", adapter)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (adapter / "README.md").write_text("old")
    assert run_command(command.main, [str(finished), "--to", "adapter"]) == 0
    assert file_hash(adapter / WEIGHTS) == file_hash(finished / "adapter" / WEIGHTS)
    assert (adapter / "README.md").read_text() != "old"


def test_a_full_or_a_read_only_disk_is_named(small_disk, finished, capsys):
    (small_disk / "ballast").write_bytes(bytes((4 << 20) - (64 << 10)))
    line = complaint(capsys, finished, "--to", "merged", "--output", small_disk / "out")
    assert "GB left and the merged model takes 0.0016 GB: free some space" in line
    line = complaint(capsys, finished, "--to", "adapter", "--output", small_disk / "out")
    assert "out cannot be written: the disk is full; free some space" in line
    assert not [p for p in small_disk.rglob("*") if p.is_file() and p.name != "ballast"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = complaint(capsys, finished, "--to", "adapter", "--output", small_disk / "out")
    assert "out cannot be written: Read-only file system; check the folder" in line


def lose_the_recipe(run: Path) -> None:
    (run / "recipe.yaml").unlink()


def not_finished(run: Path) -> None:
    shutil.rmtree(run / "adapter")


def another_adapter(run: Path) -> None:
    weights = load_file(run / "adapter" / WEIGHTS)
    save_file({name: w + 1e-3 for name, w in weights.items()}, run / "adapter" / WEIGHTS)


def quantised_itself(run: Path) -> None:
    shutil.copytree(TINY_MODEL, run / "base")
    config = json.loads((run / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (run / "base" / "config.json").write_text(json.dumps(config))
    set_model(run, name=str(run / "base"))


def its_own_code(run: Path) -> None:
    set_model(run, trust_remote_code=True)


def set_model(run: Path, **changes) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= changes
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def another_base(run: Path) -> None:
    """As after somebody has written other weights to the same name."""
    summary = json.loads((run / "summary.json").read_text())
    summary["origins"]["model"] = "files 0123"
    (run / "summary.json").write_text(json.dumps(summary))


def half_a_summary(run: Path) -> None:
    (run / "summary.json").write_text((run / "summary.json").read_text()[:50])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_the_recipe, "is no run: it has no recipe.yaml; give a folder like runs/NAME"),
        (not_finished, "let the run finish, or give --adapter"),
        (another_adapter, "is not what the run ended with"),
        (half_a_summary, "summary.json cannot be read"),
        (quantised_itself, "is quantised itself, and an adapter is merged into full weights only"),
        (its_own_code, "brings code of its own"),
        (another_base, "is not the model that the run was trained on (files 0123; now files "),
    ],
)
def test_a_run_that_cannot_be_exported(run, capsys, spoil, message):
    spoil(run)
    assert message in complaint(capsys, run, "--to", "merged")
    assert not list((run / "export").glob("*"))


def test_a_checkpoint_is_exported_without_the_runs_figures(run, capsys):
    [newest] = (run / "checkpoints").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"adapter_sha256": "of a later one"}))
    assert run_command(command.main, [str(run), "--to", "adapter", "--adapter", str(newest)]) == 0
    card = (run / "export" / "adapter" / "README.md").read_text()
    assert "a checkpoint of the run, 000004" in card and "Not known: this is a checkpoint" in card
    assert f"| model as loaded | {summary['origins']['model']} |" in card
    weights = load_file(newest / WEIGHTS)
    save_file({name: w * 0.5 for name, w in weights.items()}, newest / WEIGHTS)
    line = complaint(capsys, run, "--to", "adapter", "--adapter", newest)
    assert "000004 is damaged: adapter_model.safetensors has changed" in line


def test_traces_and_data_are_what_it_compares_on(run, capsys):
    shutil.rmtree(run / "traces")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["source"] = "gone.jsonl"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "there is nothing to compare the merged model on" in complaint(capsys, run, "--to", "merged")


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("an earlier export")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "out") as aside:
        (aside / "model.safetensors").write_bytes(bytes(100))
        raise KeyboardInterrupt
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/old"]
