"""Training that goes on from an adapter: the same outputs, its base for a divergence, its record, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.evaluate.evaluation import evaluate, own_adapter
from hapo_lite.export.export import export
from hapo_lite.model.adapter import save_adapter
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.model.start import adapter_folder
from hapo_lite.preflight.preflight import preflight
from hapo_lite.recipe import LoraSettings, ModelSettings, load_recipe
from hapo_lite.records import Sequences
from hapo_lite.runs.checkpoint import read_record
from hapo_lite.runs.files import file_hash
from hapo_lite.train import run
from hapo_lite.train.__main__ import main
from hapo_lite.verify_resume.verify import left_by
from tests.conftest import TINY, noisy_adapter, score
from tests.loops import run_steps, train_into_the_third
from tests.test_origins import COMMIT, hub  # noqa: F401 (a fixture)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LORA = LoraSettings(rank=8, alpha=16.0)
PLAIN = ModelSettings(name="tiny", quantization="none", lora=LORA)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter that changes the bundled model a good deal, as plain peft saves it."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = load_policy(PLAIN, 3, "cpu")
    with noisy_adapter(policy, 0.1, seed=1):
        save_adapter(policy, folder)
    return folder


@pytest.fixture
def changed(adapter, tmp_path):
    """changed(key=value, ...): a copy of the adapter whose adapter_config.json differs in that."""

    def change(**values) -> Path:
        folder = shutil.copytree(adapter, tmp_path / "changed")
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))
        return folder

    return change


def logprobs_of(policy, loop_or_completions):
    return policy.completion_logprobs(Sequences.of(loop_or_completions), 1.0)[0].detach()


def test_training_begins_with_what_the_adapter_says_and_trains_it(adapter, make_recipe, make_loop):
    loop = make_loop(make_recipe("method=archer", f"model.adapter={adapter}", "training.warmup_updates=0"))
    sampled = load_policy(loop.recipe.model.without_adapter(), 0, "cpu", adapter=adapter)
    completions = loop.sample(run_steps(loop, 0)[0]).completions
    begun = logprobs_of(loop.policy, completions)
    assert torch.equal(begun, logprobs_of(sampled, completions))
    alone = load_policy(loop.recipe.model.without_adapter(), 5, "cpu")  # a new adapter changes nothing
    assert float((begun - logprobs_of(alone, completions)).abs().max()) > 0.5
    before = {name: p.detach().clone() for name, p in loop.policy.trainable().items()}
    run_steps(loop, 1)
    assert all(not torch.equal(before[name], p) for name, p in loop.policy.trainable().items())


def test_the_divergence_is_from_the_base_without_any_adapter(adapter, make_recipe, make_loop):
    loop = make_loop(make_recipe("method=archer", f"model.adapter={adapter}", "model.quantization=none"))
    collected = loop.sample(run_steps(loop, 0)[0])
    base = logprobs_of(load_policy(PLAIN, 5, "cpu"), collected.completions)
    for row, found in enumerate(score(loop, collected, 1).experience.reference_logp):
        torch.testing.assert_close(found, base[row, : len(found)], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> Path:
    """A finished run of two iterations, with checkpoints."""
    folder = tmp_path_factory.mktemp("warm")
    settings = [
        f"output_dir={folder}",
        "rollout.prompts_per_iteration=4",
        "rollout.completions_per_prompt=4",
        "training.iterations=2",
        "training.warmup_updates=0",
        "evaluation.prompts=0",
        "checkpoint.every=1",
        "logging.progress=false",
        "reward.workers=1",
    ]
    assert run_command(main, [str(TINY), *settings]) == 0
    return folder / "tiny_cpu"


@pytest.mark.parametrize("place", ["", "adapter", "checkpoints/000002"])
def test_a_run_its_adapter_and_its_checkpoint_are_the_same_start(warm, make_recipe, place):
    settings = make_recipe(f"model.adapter={warm / place}").model
    policy = load_policy(settings, 9, "cpu")
    saved = load_file(warm / "adapter" / WEIGHTS)
    mine = {name.replace(".default", ""): p for name, p in policy.trainable().items()}
    assert mine.keys() == saved.keys() and all(torch.equal(mine[name], saved[name]) for name in saved)
    assert policy.started_from == f"{settings.adapter}, sha256 {file_hash(warm / 'adapter' / WEIGHTS)}"


def test_a_hub_name_is_a_start_too(adapter, hub):  # noqa: F811
    shutil.copytree(adapter, hub("someone/lora", COMMIT), dirs_exist_ok=True)
    policy = load_policy(PLAIN.model_copy(update={"adapter": "someone/lora"}), 0, "cpu")
    assert policy.started_from == f"someone/lora, sha256 {file_hash(adapter / WEIGHTS)}"
    with pytest.raises(UserError, match=r"someone/other is neither a folder here nor an adapter that the hub gives"):
        adapter_folder("someone/other")


def test_a_run_resumes_to_the_same_bytes_when_its_start_is_gone(warm, make_recipe, tmp_path, monkeypatch, capsys):
    start = shutil.copytree(warm, tmp_path / "start")
    digest = file_hash(start / "adapter" / WEIGHTS)
    whole = make_recipe(
        f"model.adapter={start}", "checkpoint.every=1", "data.limit=64", f"output_dir={tmp_path / 'whole'}"
    )
    run.train(whole)
    printed = capsys.readouterr().out
    assert f"going on from the adapter {start}, sha256 {digest}" in printed
    stopped = whole.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    train_into_the_third(stopped, monkeypatch)
    shutil.rmtree(start)
    summary = run.train(stopped)
    assert left_by(tmp_path / "stopped") == left_by(tmp_path / "whole")
    origins = read_record(stopped.run_dir / "checkpoints" / "000003")["origins"]
    assert origins["adapter"] == summary["origins"]["adapter"] == f"{start}, sha256 {digest}"
    # The adapter that the run began with is part of what the run is.
    with pytest.raises(UserError, match=r"was made with model\.adapter = .*start, the recipe now says None"):
        run.train(stopped.model_copy(update={"model": stopped.model.without_adapter()}))
    export(stopped.run_dir, "merged")
    card = (stopped.run_dir / "export" / "merged" / "README.md").read_text()
    assert f"| went on from the adapter | {start}, sha256 {digest} |" in card


def test_a_first_start_without_its_adapter_is_refused(make_recipe, tmp_path):
    with pytest.raises(UserError, match=r"model\.adapter = .*gone is not a folder: give a run's folder"):
        run.train(make_recipe(f"model.adapter={tmp_path / 'gone'}"))


def test_preflight_names_the_adapter_and_refuses_one_that_does_not_fit(adapter, make_recipe, capsys):
    preflight(make_recipe(f"model.adapter={adapter}"), None, True, None)
    assert f"goes on from the adapter {adapter}, sha256 " in capsys.readouterr().out
    with pytest.raises(UserError, match="has rank 8"):
        preflight(make_recipe(f"model.adapter={adapter}", "model.lora.rank=4"), None, True, None)


def test_an_evaluation_before_the_run_takes_the_start(adapter, warm, make_recipe, capsys):
    recipe = make_recipe(f"model.adapter={adapter}", "benchmark.limit=2", "benchmark.samples=2")
    assert own_adapter(recipe) == adapter
    summaries = evaluate(recipe)
    assert f"tiny and {adapter} on tiny" in capsys.readouterr().out and "difference" in summaries["tiny"]
    finished = load_recipe(warm / "recipe.yaml", [f"model.adapter={adapter}"])
    assert own_adapter(finished) == warm / "adapter"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.lora.rank=4"], r"has rank 8, and model\.lora\.rank = 4: set model\.lora\.rank=8$"),
        (["model.lora.alpha=8"], r"has alpha 16, and model\.lora\.alpha = 8: set model\.lora\.alpha=16$"),
        (
            ["model.lora.targets=[q_proj, v_proj]"],
            r"adapts .*gate_proj.*, and model\.lora\.targets = \[q_proj, v_proj\] adapts q_proj, v_proj: set "
            r"model\.lora\.targets=\[down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj\]$",
        ),
    ],
)
def test_another_shape_than_the_recipes_is_named_with_what_to_set(adapter, make_recipe, overrides, sentence):
    start = rf"model\.adapter = {adapter} "
    with pytest.raises(UserError, match=start + sentence):
        load_policy(make_recipe(f"model.adapter={adapter}", *overrides).model, 0, "cpu")
    told = str(sentence).rpartition("set ")[2].replace("\\", "").rstrip("$")
    load_policy(make_recipe(f"model.adapter={adapter}", *overrides, told).model, 0, "cpu")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"base_model_name_or_path": "Qwen/Qwen3-8B"},
            r"belongs to the base Qwen/Qwen3-8B, and model\.name = tiny: set model\.name=Qwen/Qwen3-8B, or",
        ),
        (
            {"use_rslora": True},
            r"is of the variant rslora, and model\.lora\.variant = lora: set model\.lora\.variant=rslora$",
        ),
        ({"use_rslora": True, "use_dora": True}, r"has rsLoRA and DoRA at once, and one of them is trained here"),
        ({"modules_to_save": ["lm_head"]}, r"has whole layers \(modules_to_save\)"),
        ({"bias": "all"}, r"has biases \(bias = all\)"),
        ({"peft_type": "IA3"}, r"is of peft's kind IA3, and LORA is trained here"),
        ({"r": "many"}, r"cannot be read: its adapter_config\.json has the rank 'many'"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(changed, values, sentence):
    with pytest.raises(UserError, match=sentence):
        load_policy(PLAIN.model_copy(update={"adapter": str(changed(**values))}), 0, "cpu")


def test_the_bundled_model_and_a_copy_of_the_base_are_the_same_base(changed, tmp_path):
    for number, base in enumerate(("/gone/site-packages/hapo_lite/tiny/model", tmp_path / "copy", "")):
        if number == 1:
            shutil.copytree(TINY_MODEL, base)
        folder = changed(base_model_name_or_path=str(base))
        load_policy(PLAIN.model_copy(update={"adapter": str(folder)}), 0, "cpu")
        shutil.rmtree(folder)


def test_weights_that_do_not_fit_the_layers_are_refused(changed):
    folder = changed()
    whole = load_file(folder / WEIGHTS)
    settings = PLAIN.model_copy(update={"adapter": str(folder)})
    save_file({key: w for key, w in whole.items() if ".layers.0." not in key}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"has \d+ matrices, and model\.lora puts \d+ on tiny: give an adapter of the"):
        load_policy(settings, 0, "cpu")
    save_file({key: w[:4] for key, w in whole.items()}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"has matrices of \(4, .*\) where tiny needs \(8, "):
        load_policy(settings, 0, "cpu")
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(settings, 0, "cpu")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_policy(settings, 0, "cpu")


def test_a_folder_without_an_adapter_says_what_to_give(warm, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(warm / "checkpoints", unfinished / "checkpoints")
    with pytest.raises(UserError, match=r"without an adapter so far: .* model\.adapter=.*/checkpoints/000002$"):
        adapter_folder(str(unfinished))
    with pytest.raises(UserError, match=r"holds no adapter: give a run's folder, its adapter/"):
        adapter_folder(str(tmp_path))
