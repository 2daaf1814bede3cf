"""What is done with a model after training, on real weights: evaluate, export, inspect, and preflight before it."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.cli import run_command
from hapo_lite.evaluate import __main__ as evaluate
from hapo_lite.export import __main__ as export
from hapo_lite.export import probes
from hapo_lite.inspect.generate import GenerationSettings, generate
from hapo_lite.records import Sequences
from hapo_lite.train.accelerator import make_accelerator
from tests.allocations import check_stages
from tests.commands import own_precision
from tests.conftest import ROOT, TINY
from tests.export.command import scored
from tests.real.conftest import GAP, GSM8K, WAYS


@pytest.fixture(scope="package")
def problems() -> list[dict]:
    """The first eight of GSM8K's test problems."""
    return pyarrow.parquet.read_table(GSM8K["test"]).slice(0, 8).to_pylist()


@pytest.mark.parametrize("trained", ["bf16"], indirect=True)
def test_an_evaluation_on_real_problems_goes_on_where_it_was_cut(trained, settings, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [str(TINY), *settings, *WAYS["bf16"], f"output_dir={tmp_path}", "data.max_prompt_tokens=256"]
    arguments += ["--adapter", str(trained.folder / "adapter"), "--suite", f"gsm8k={GSM8K['test']}"]
    arguments += ["benchmark.limit=8", "benchmark.samples=1", "benchmark.max_new_tokens=16", "rollout.batch_size=4"]
    folder = tmp_path / "tiny_cpu" / "evaluations" / "gsm8k"

    def evaluated() -> dict:
        with own_precision():
            assert run_command(evaluate.main, arguments) == 0
        return json.loads((folder / "summary.json").read_text())

    summary = evaluated()
    assert summary["prompts"] == 8 and not summary["rows_skipped"] and not summary["too_long"]["prompts"]
    whole = {label: (folder / name).read_bytes() for label, name in summary["files"].items()}
    texts = {}
    for label, content in whole.items():
        samples = [json.loads(line) for line in content.splitlines()[1:]]
        assert [sample["gold"] for sample in samples] == [p["answer"].rpartition("#### ")[2] for p in problems]
        assert sum(summary["outcomes"][label].values()) == 8
        texts[label] = [sample["text"] for sample in samples]
    assert set(texts) == {"base", "adapter"} and texts["base"] != texts["adapter"]
    cut = folder / summary["files"]["adapter"]
    cut.write_bytes(b"".join(whole["adapter"].splitlines(keepends=True)[:7])[:-5])  # in the sixth sample
    again = evaluated()
    assert {label: (folder / name).read_bytes() for label, name in again["files"].items()} == whole
    assert {label: seconds["prompts"] for label, seconds in again["seconds"].items()} == {"base": 0, "adapter": 4}


@pytest.mark.parametrize("trained", ["fp32"], indirect=True)
def test_a_merged_export_is_the_trained_model_to_plain_transformers(trained, tmp_path, monkeypatch):
    """In fp32, where a merge loses next to nothing: the adapter's log-probabilities come back from the disk."""
    monkeypatch.setattr(probes, "ANSWER_TOKENS", 8)  # greedy answers cost most of an export's time on a CPU
    arguments = [str(trained.folder), "--to", "merged", "--dtype", "fp32", "--output", str(tmp_path / "merged")]
    assert run_command(export.main, arguments) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with trained.policy.sampling() as model:
        adapter = scored(model, tokenizer, trained.folder)
        with trained.policy.base_alone():
            effect = float((scored(model, tokenizer, trained.folder) - adapter).abs().mean())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert effect > 0.02 and float((scored(plain, tokenizer, trained.folder) - adapter).abs().mean()) < 1e-4
    drift = json.loads((tmp_path / "merged" / "export.json").read_text())["drift"]
    assert drift["tokens"] > 0 and drift["other"] == 0


def test_a_generation_of_the_inspector_shows_what_the_trainer_computes(trained, problems):
    """Both passes: the plain one, which the signal is fitted on, and the one at adapted temperatures."""
    settings = GenerationSettings(problems[0]["question"], max_new_tokens=16, seed=1)
    *_, progress = generate(trained.policy, settings)
    tokens, signal = progress.trace.tokens, progress.trace.sampling_signal
    prompt = trained.policy.encode([{"role": role, "content": content} for role, content in settings.messages])
    length = len(tokens["id"])
    batch = Sequences(
        torch.tensor([[*prompt, *tokens["id"]]]),
        torch.tensor([len(prompt)]),
        torch.tensor([length]),
        torch.ones(1, length, dtype=torch.bool),
    )
    with own_precision(), torch.no_grad(), make_accelerator(trained.recipe).autocast():
        logp, entropy = (found[0] for found in trained.policy.completion_logprobs(batch))
    for name, expected in (("logp_base", logp), ("entropy", entropy)):
        assert float((torch.tensor(tokens[name]) - expected).abs().mean()) < GAP[trained.way], name
    temperature = torch.tensor(tokens["temperature"])
    assert torch.allclose(temperature, adaptive_temperature(torch.tensor(tokens["entropy"]), signal))
    assert length > 8 and temperature.min() < 1.0 < temperature.max()


@pytest.mark.parametrize("trained", ["nf4"], indirect=True)
def test_preflight_predicts_what_is_allocated(trained):
    """Within a tenth, beyond weights, adapter, optimiser and gradients, which it knows to the byte."""
    check_stages(trained.recipe, trained.policy, rollout=True)
