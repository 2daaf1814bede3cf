"""Merging: the merged model is the one that was trained, or the export is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.export import __main__ as command
from hapo_lite.export import probes
from hapo_lite.export.merge import DTYPES, placement
from hapo_lite.export.parity import Drift
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.recipe import LoraSettings, ModelSettings
from tests.export.command import WEIGHTS, complaint, scored, set_model


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


# Peft warns of just that, when the adapter is made or loaded and when it is merged.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning:peft")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the tied_target_modules:UserWarning:peft")
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
