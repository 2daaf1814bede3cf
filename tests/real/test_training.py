"""Training on real weights: the check, the sampler, an iteration in each dtype, and a run that was killed."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.engine_check import FaultyEngine, faulty_engines
from hapo_lite.errors import UserError
from hapo_lite.recipe import load_recipe
from hapo_lite.records import EncodedPrompt, Request
from hapo_lite.rollout.canary import compare as compare_engine
from hapo_lite.rollout.canary import engine_logp, stepwise_logp, trainer_logp
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.engine import make_engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.lines import MetricsFile
from hapo_lite.runs.status import read_status
from hapo_lite.runs.trace import read_traces
from hapo_lite.tasks.data import load_prompts
from hapo_lite.train import run
from hapo_lite.verify_resume.verify import Aim, Findings, Launch, compare, left_by
from tests.commands import ENVIRONMENT, own_precision
from tests.conftest import ROOT, TINY
from tests.real.conftest import GAP, WAYS, base_digest

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def lines(trained) -> list[dict]:
    """The metrics of both iterations."""
    return MetricsFile(trained.folder / "metrics.jsonl").read()[1:]


def test_the_check_passes_on_the_right_engine_and_the_run_ends(trained, lines):
    doing = read_status(trained.folder / "status.json")
    assert doing.stage == "finished" and doing.entered["engine check"] == 1
    assert [line["updates"] for line in lines] == [1, 2]
    assert all(line["update/grad_norm"] > 0 and line["entropy/all_mean"] > 0.1 for line in lines)


def test_the_sampler_is_as_near_to_the_trainer_as_the_dtype_allows(trained, lines):
    assert all(0 < line["sampler/gap_mean"] < GAP[trained.way] for line in lines)


@pytest.fixture
def prompts(trained) -> list[EncodedPrompt]:
    """The first 16 of GSM8K's training problems."""
    chosen = load_prompts(trained.recipe.data.model_copy(update={"limit": 16})).prompts
    return [EncodedPrompt(i, p, tuple(trained.policy.encode(p.chat()))) for i, p in enumerate(chosen)]


@pytest.mark.parametrize("trained", ["bf16"], indirect=True)
def test_the_sampler_is_at_the_floor_of_rounding(trained, prompts):
    """Over 1,024 tokens its distance is at most 1.1 floors, to three standard errors.

    The check's own 64 tokens cannot tell: their ratio to the floor varies by 0.15 on SmolLM2 and by 0.26 on Qwen. A
    head whose logits are rounded, the nearest wrong sampler, is told from the right one.
    """
    policy, temperature = trained.policy, trained.recipe.rollout.temperature
    engine = make_engine(trained.recipe, policy)
    key = DrawKey(trained.recipe.seed, Stage.CANARY, iteration=0)
    completions = engine.sample([Request(p, 0) for p in prompts], AdaptiveTemperature(None, temperature), key, limit=64)
    trainer = trainer_logp(policy, completions, temperature)
    floor, rounded = ((steps - trainer).abs() for steps in stepwise_logp(policy, completions, temperature))

    def above(distance: torch.Tensor) -> float:
        """How far the mean of [N] is above 1.1 floors, in standard errors."""
        excess = distance - 1.1 * floor
        return float(excess.mean() / (excess.std() / len(excess) ** 0.5))

    assert above((engine_logp(completions) - trainer).abs()) < 3 < above(rounded)


@pytest.mark.parametrize("trained", ["bf16"], indirect=True)
def test_the_check_tells_right_from_wrong(trained, prompts):
    """With the adapter that was trained: a block that is missing is a thirtieth of it."""
    recipe, policy = trained.recipe, trained.policy
    found = compare_engine(make_engine(recipe, policy), policy, prompts, recipe.rollout, recipe.seed)
    assert found.right and found.followed == pytest.approx(1.0, abs=0.02)
    for name in ("one block's adapter missing", "adapter one step old"):
        engine = faulty_engines(recipe, policy, None, seed=7)[name]
        assert not compare_engine(engine, policy, prompts, recipe.rollout, recipe.seed).right, name


def test_every_ratio_is_one_to_the_last_bit_before_the_first_update(trained, lines):
    """At one temperature for all tokens, and in the second iteration at one of its own for each."""
    assert lines[0]["temperature/min"] == lines[0]["temperature/max"] == 1.0
    assert lines[1]["temperature/min"] < 1.0 < lines[1]["temperature/max"]
    assert all(line["ratio/min"] == line["ratio/max"] == 1.0 for line in lines)
    for iteration in (1, 2):
        traces = read_traces(trained.folder / "traces" / f"{iteration:06d}.jsonl")
        assert traces and all(trace.tokens["logp_new"] == trace.tokens["logp_old"] for trace in traces)


def test_every_adapter_parameter_moves_and_the_base_does_not(trained):
    assert base_digest(trained.policy) == trained.base
    after = trained.policy.trainable()
    assert after.keys() == trained.adapter.keys() and len(after) > 300
    assert not [name for name, before in trained.adapter.items() if torch.equal(after[name], before)]


def test_the_adapter_that_was_saved_is_the_one_that_was_trained(trained):
    saved = load_file(trained.folder / ADAPTER)
    after = {name.replace(".default", ""): p for name, p in trained.policy.trainable().items()}
    assert saved.keys() == after.keys() and all(torch.equal(saved[name], after[name]) for name in saved)


def test_an_engine_without_the_adapter_is_stopped_in_bf16(settings, tmp_path, monkeypatch):
    """Where the rounding of the two arithmetics is largest."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        run, "make_engine", lambda recipe, policy: FaultyEngine(make_engine(recipe, policy), policy.base_alone)
    )
    with own_precision(), pytest.raises(UserError, match="does not sample from the policy"):
        run.train(load_recipe(TINY, [*settings, *WAYS["bf16"], f"output_dir={tmp_path}"]))


@pytest.mark.parametrize("trained", ["bf16"], indirect=True)
def test_killed_in_an_update_it_resumes_to_the_same_bytes(trained, settings, tmp_path, monkeypatch):
    """As the run that nobody killed, which another process made."""
    monkeypatch.chdir(ROOT)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    command = [sys.executable, "-m", "hapo_lite.train", str(TINY), *settings, *WAYS["bf16"], "name=bf16"]
    findings = Findings()
    killed = Launch(command, tmp_path).to_kill(Aim("update", skip=1, after=0.0))
    assert (killed.doing.stage, killed.doing.iteration) == ("update", 2) and not killed.complaints
    assert not (tmp_path / "bf16" / "adapter").exists()
    Launch(command, tmp_path).to_its_end()
    compare(left_by(trained.folder.parent), left_by(tmp_path), tmp_path.name, findings)
    assert not findings.complaints
    assert set(findings.compared) >= {"adapters", "completions", "files", "numbers", "optimiser states", "prompts"}
    summaries = [json.loads((run / "summary.json").read_text()) for run in (trained.folder, tmp_path / "bf16")]
    assert summaries[0]["adapter_sha256"] == summaries[1]["adapter_sha256"]
