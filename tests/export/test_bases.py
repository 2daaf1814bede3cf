"""The base of a merge: the 4-bit one that was trained on, unpacked, or the original one; the nearer by default."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo_lite.cli import run_command
from hapo_lite.export import __main__ as command
from hapo_lite.export.bases import ORIGINAL, TRAINED, Trained, through_four_bits
from hapo_lite.export.merge import _choose
from hapo_lite.export.parity import refer
from hapo_lite.export.probes import Probes
from hapo_lite.model.load import load_policy
from hapo_lite.model.unpacked import unpack
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.train import __main__ as train
from tests.conftest import TINY, noisy_adapter
from tests.export.command import complaint, scored, set_model

PROBES = Probes(texts=(((5, 6, 7), (9, 30, 2)), ((8,), (3, 4, 11, 40, 2))), prompts=((5, 6, 7), (8, 9)))


def load(quantization):
    lora = LoraSettings(rank=4, alpha=8.0)
    return load_policy(ModelSettings(name="tiny", quantization=quantization, dtype="fp32", lora=lora), 0, "cpu")


def test_a_weight_goes_through_four_bits_as_the_training_packs_it():
    packed, full = load("nf4"), dict(load("none").model.named_modules())
    layers = {name: layer for name, layer in packed.model.named_modules() if isinstance(layer, Linear4bit)}
    assert len(layers) == 21
    for name, layer in layers.items():
        weight = full[name].weight.data
        unpacked = through_four_bits(weight)
        assert torch.equal(unpacked, unpack(layer, torch.float32)) and not torch.equal(unpacked, weight)
        assert torch.equal(through_four_bits(weight.T.contiguous(), transposed=True), unpacked.T)


@pytest.mark.parametrize(("quantization", "nearer"), [("nf4", TRAINED), ("none", ORIGINAL)])
def test_the_nearer_base_is_the_default_and_both_distances_are_measured(quantization, nearer):
    names = tuple(name for name, layer in load("nf4").model.named_modules() if isinstance(layer, Linear4bit))
    reference, full = load(quantization), load("none")
    with noisy_adapter(reference, 0.05, 1), noisy_adapter(full, 0.05, 1):
        trained = Trained(refer(reference, PROBES), names)
        choice = _choose(trained, full, PROBES, None)
    other = {TRAINED: ORIGINAL, ORIGINAL: TRAINED}[nearer]
    assert choice.onto == nearer and choice.gaps[nearer].mean < 1e-5 < 1e-3 < choice.gaps[other].mean
    assert choice.gaps[nearer].same == 2
    assert choice.gaps[nearer].tokens == sum(len(text) for _, text in trained.reference.texts)
    with noisy_adapter(full, 0.05, 1):
        assert _choose(trained, full, PROBES, other).onto == other


def test_a_merge_into_the_unpacked_base_is_what_was_trained(run):
    """By plain transformers on the written weights, beside the adapter on its 4-bit base."""
    assert run_command(command.main, [str(run), "--to", "merged"]) == 0
    folder = run / "export" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = ModelSettings(name="tiny", quantization="nf4", dtype="fp32")
    trained = scored(load_policy(settings, 0, "cpu", run / "adapter").model, tokenizer, run)
    written = scored(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, run)
    full = load_policy(settings.model_copy(update={"quantization": "none"}), 0, "cpu", run / "adapter")
    original = scored(full.model, tokenizer, run)
    record = json.loads((folder / "export.json").read_text())
    mean = (written - trained).abs().mean()
    assert mean < 5e-4 and mean < 0.2 * (original - trained).abs().mean()
    assert record["onto"]["base"] == TRAINED and not record["onto"]["asked"]
    assert record["onto"]["unpacked"]["mean"] < 5e-4 < record["four_bit"]["mean"]
    card = (folder / "README.md").read_text()
    assert "| merged into | the 4-bit base of the training, unpacked |" in card
    for gap in (record["onto"]["unpacked"], record["four_bit"]):
        assert f"{gap['mean']:.2g} nats a token (at most {gap['largest']:.2g}; {gap['same']} of 8 greedy" in card


def test_the_original_base_where_it_is_asked_for(merged):
    record = json.loads((merged / "export.json").read_text())
    assert record["onto"]["base"] == ORIGINAL and record["onto"]["asked"]
    assert "| merged into | the original base |" in (merged / "README.md").read_text()


def test_a_base_that_there_is_not_is_refused(run, capsys):
    assert "--to adapter merges nothing" in complaint(capsys, run, "--to", "adapter", "--onto", "trained")
    set_model(run, quantization="none")
    line = complaint(capsys, run, "--to", "merged", "--onto", "trained")
    assert "this one was trained on the original base (model.quantization = none): leave --onto out" in line


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["rslora", "dora"])
@pytest.mark.parametrize("onto", [TRAINED, ORIGINAL])
def test_the_other_variants_are_merged_too(tmp_path, variant, onto):
    settings = [
        f"output_dir={tmp_path}",
        f"model.lora.variant={variant}",
        "rollout.prompts_per_iteration=4",
        "rollout.completions_per_prompt=4",
        "training.iterations=2",
        "training.learning_rate=0.002",
        "training.warmup_updates=0",
        "evaluation.prompts=0",
        "reward.workers=1",
        "logging.progress=false",
    ]
    assert run_command(train.main, [str(TINY), *settings]) == 0
    run = Path(tmp_path / "tiny_cpu")
    assert run_command(command.main, [str(run), "--to", "gguf-ready", "--onto", onto]) == 0
    card = (run / "export" / "gguf-ready" / "README.md").read_text()
    assert {"rslora": "one rsLoRA adapter of rank 8", "dora": "one DoRA adapter of rank 8"}[variant] in card
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "export" / "gguf-ready").lm_head, nn.Linear)
