"""Predicted memory against what torch really allocates, on the CPU, where every allocation can be counted."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen3Config

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.preflight import __main__ as preflight
from hapo_lite.preflight.advise import Advice, write_back
from hapo_lite.preflight.measure import prepare
from hapo_lite.preflight.table import suggestion
from hapo_lite.recipe import load_recipe
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.memory.predict import Predictor, worst_case
from hapo_lite.train.memory.room import usable
from tests.allocations import check_stages
from tests.conftest import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of Qwen's kind with grouped keys, 4 layers, and a vocabulary that is large beside them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8192}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(path)
    return path


WAYS = {
    "4-bit, checkpointing": (
        "model.quantization=nf4",
        "model.dtype=fp32",
        "model.gradient_checkpointing=true",
        "rollout.unpacked_base=never",
    ),
    "4-bit": ("model.quantization=nf4", "model.dtype=fp32", "rollout.unpacked_base=never"),
    "4-bit, unpacked": ("model.quantization=nf4", "model.dtype=fp32", "rollout.unpacked_base=always"),
    "bf16": ("model.quantization=none", "model.dtype=bf16", "model.gradient_checkpointing=true"),
}


@pytest.mark.parametrize("way", WAYS)
def test_prediction_is_within_a_tenth_of_what_is_allocated(make_recipe, folder, way):
    recipe = make_recipe(
        f"model.name={folder}",
        "model.lora.rank=16",
        "data.max_prompt_tokens=64",
        "rollout.max_new_tokens=64",
        "rollout.batch_size=16",
        "training.micro_batch_tokens=1024",
        *WAYS[way],
    )
    sizes = worst_case(recipe, Predictor(recipe, "cpu").context)
    assert (sizes.batch, sizes.width, sizes.rows, sizes.prompts) == (8, 128, 16, 4)
    # In bf16 a CPU's matrix library makes copies that a GPU's does not; checkpointing changes no rollout.
    policy = load_policy(recipe.model, recipe.seed, "cpu")
    check_stages(recipe, policy, rollout=way in ("4-bit, checkpointing", "4-bit, unpacked"))


QWEN = {
    "1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
"""Hidden, feed-forward, layers, heads, key heads, head size, vocabulary, tied: Qwen2.5-Math-1.5B and -7B, Qwen3-8B."""


def write_config(folder, name: str, layers: int | None = None):
    width, wide, depth, heads, keys, size, vocabulary, tied = QWEN[name]
    kind = Qwen3Config if name == "8b" else Qwen2Config
    config = kind(
        hidden_size=width,
        intermediate_size=wide,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        architectures=["Qwen3ForCausalLM" if name == "8b" else "Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("name", QWEN)
def test_weights_of_the_models_it_is_named_for(make_recipe, tmp_path, name):
    width, wide, depth, heads, keys, size, vocabulary, tied = QWEN[name]
    recipe = make_recipe(f"model.name={write_config(tmp_path, name)}", "model.lora.rank=32")
    predictor = Predictor(recipe, "cuda", torch.bfloat16)
    shapes = [(width, heads * size), (width, keys * size), (width, keys * size), (heads * size, width)]
    shapes += [(width, wide), (width, wide), (wide, width)]
    # Half a byte a weight, a byte for 64 of them, 4 bytes for 16,384; and a layer's tables of 4-bit and 8-bit codes.
    packed = sum(n * m // 2 + n * m // 64 + 4 * math.ceil(n * m / 16384) + 4 * 273 for n, m in shapes)
    biases = 0 if name == "8b" else 2 * (heads + 2 * keys) * size
    norms = 2 * 2 * width + (2 * 2 * size if name == "8b" else 0)
    outside = 2 * vocabulary * width * (1 if tied else 2) + 2 * width
    found = predictor.resident["base weights"]
    # Beside these, rotary frequencies: under a kilobyte.
    assert 0 <= found - (depth * (packed + biases + norms) + outside) < 1024
    lora = 32 * sum(n + m for n, m in shapes) * depth
    assert predictor.resident["adapter"] == 4 * lora and predictor.resident["optimiser"] == 8 * lora


def test_shape_only_fits_a_card_and_writes_it_into_the_recipe(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    text = (
        "# A head comment.\n"
        f"model: {{name: {write_config(tmp_path, '1.5b', layers=2)}, gradient_checkpointing: true}}  # here\n"
        "data:\n  source: tiny\n  max_prompt_tokens: 512\n\n"
        "rollout: {prompts_per_iteration: 128, max_new_tokens: 1024, batch_size: 1024}\n"
        "training:\n  iterations: 5   # few\n  optimizer: adamw_8bit\n"
    )
    file.write_text(text)
    command = [str(file), "--shape-only", "--card", "2", "--write"]
    assert run_command(preflight.main, command) == 0
    printed = capsys.readouterr().out
    assert "does not fit: the rollout takes" in printed and "written to" in printed
    written = load_recipe(file)
    tokens, rows = written.training.micro_batch_tokens, written.rollout.batch_size
    assert file.read_text() == text.replace("batch_size: 1024", f"batch_size: {rows}").replace(
        "training:\n", f"training:\n  micro_batch_tokens: {tokens}\n"
    )
    # As large as fits: whole sequences and groups, and one more of either would not.
    assert tokens % 1536 == 0 and rows % 8 == 0
    predictor = Predictor(written, "cuda", torch.bfloat16)
    rollout, _, update = predictor.stages()
    room = usable(2 << 30)
    assert rollout.total <= room and update.total <= room
    more = load_recipe(file, [f"training.micro_batch_tokens={tokens + 1536}", f"rollout.batch_size={rows + 8}"])
    rollout, _, update = predictor.stages(more)
    assert rollout.total > room and (update.total > room or tokens == 1536 * 128 * 8 // 4)


def test_nothing_is_written_that_does_not_load(tmp_path, capsys):
    """Shorter completions that fit the card may lie below the ramp of the overlong penalty."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"model: {{name: {write_config(tmp_path, '1.5b', layers=2)}, gradient_checkpointing: true}}\n"
        "data: {source: tiny, max_prompt_tokens: 512}\n"
        "rollout: {max_new_tokens: 32000}\n"
        "training: {iterations: 5}\n"
        "reward: {overlong_buffer: 31000}\n"
    )
    text = file.read_text()
    command = [str(file), "--shape-only", "--card", "1.5", "--write"]
    assert run_command(preflight.main, command) == 2
    assert "reward.overlong_buffer = 31000 must be smaller than that: lower it" in capsys.readouterr().err
    assert file.read_text() == text
    file.write_text(text.replace("31000", "500"))
    assert run_command(preflight.main, command) == 0
    assert 500 < load_recipe(file).rollout.max_new_tokens < 31000


def test_overrides_are_not_written(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(TINY.read_text())
    assert run_command(preflight.main, [str(file), "training.micro_batch_tokens=64", "--shape-only", "--write"]) == 2
    assert "put the overrides into the file first" in capsys.readouterr().err and file.read_text() == TINY.read_text()


def test_a_card_that_is_too_small_is_one_sentence(tmp_path, capsys):
    recipe = [str(TINY), f"model.name={write_config(tmp_path, '7b', layers=2)}"]
    assert run_command(preflight.main, [*recipe, "--shape-only", "--card", "1"]) == 2
    assert "does not fit 1 GiB with these settings: try" in capsys.readouterr().err
    assert run_command(preflight.main, [*recipe, "--shape-only", "--card", "-1"]) == 2
    assert run_command(preflight.main, [*recipe[:1], "model.name=./nowhere", "--shape-only"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    assert run_command(preflight.main, [*recipe[:1], f"model.name={tmp_path / 'own'}", "--shape-only"]) == 2
    assert "code of its own, which preflight does not run" in capsys.readouterr().err
    for content in ('{"model_type": "unheard_of"}', "{"):
        (tmp_path / "own" / "config.json").write_text(content)
        assert run_command(preflight.main, [*recipe[:1], f"model.name={tmp_path / 'own'}", "--shape-only"]) == 2
        assert "the config.json of model.name = " in (said := capsys.readouterr().err) and "no config.json" not in said


def test_every_recipe_is_the_same_again_once_its_own_settings_are_put_back(tmp_path):
    recipes = [path for path in TINY.parent.glob("*.yaml") if "\nrollout:" in path.read_text()]
    assert len(recipes) >= 7
    for recipe in recipes:
        file, before = tmp_path / recipe.name, load_recipe(recipe)
        file.write_text(recipe.read_text())
        settings = dict.fromkeys(Advice(7, 7, 7, 7, 7).settings(), 7)
        write_back(file, settings)
        after = load_recipe(file)
        assert (after.training.micro_batch_tokens, after.rollout.batch_size, after.rollout.max_new_tokens) == (7, 7, 7)
        assert len(file.read_text().splitlines()) == len(recipe.read_text().splitlines())
        own = (before.training.micro_batch_tokens, before.rollout.batch_size, before.rollout.max_new_tokens)
        write_back(file, dict(zip(settings, own, strict=True)))
        assert file.read_bytes() == recipe.read_bytes()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('"training": {iterations: 1}\n', '"training": {micro_batch_tokens: 5, iterations: 1}\n'),
        ("training:   # here\n    seed:   1\n", "training:   # here\n    micro_batch_tokens: 5\n    seed:   1\n"),
        ("training: { a: 1,\n  micro_batch_tokens: 64 }  # b\n", "training: { a: 1,\n  micro_batch_tokens: 5 }  # b\n"),
        ("# training:\nname: 'ä'\n", "# training:\nname: 'ä'\n\ntraining:\n  micro_batch_tokens: 5\n"),
        ("training:\n  'micro_batch_tokens': '64'\n", "training:\n  'micro_batch_tokens': 5\n"),
    ],
)
def test_a_setting_is_written_where_it_belongs_and_all_else_stays(tmp_path, text, written):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    write_back(file, {"training.micro_batch_tokens": 5})
    assert file.read_text() == written


@pytest.mark.parametrize("text", ["training: {}\n", "{name: x}\n"])
def test_what_cannot_be_edited_is_left_alone(tmp_path, text):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="put the settings in by hand"):
        write_back(file, {"training.micro_batch_tokens": 5})
    assert file.read_text() == text


def test_nothing_of_the_cache_is_alive_when_scoring_begins(make_recipe, make_loop):
    """Without the garbage collector: a cache of gigabytes cannot wait for it."""
    loop, caches, alive = make_loop(make_recipe()), [], {}

    def note(module, inputs, options):
        if (cache := options.get("past_key_values")) is not None:
            caches.append(weakref.ref(cache))
            caches.extend(weakref.ref(layer.keys) for layer in cache.layers if layer.keys is not None)

    loop.policy.model.get_base_model().get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    loop.resources.progress.entered = lambda stage: alive.setdefault(stage, sum(ref() is not None for ref in caches))
    gc.disable()
    try:
        loop.step(TrainState())
    finally:
        gc.enable()
    assert len(caches) > 100 and {stage: alive[stage] for stage in ("scoring", "update")} == {"scoring": 0, "update": 0}


def test_a_worst_iteration_has_a_gradient_whatever_the_recipe_rewards(make_recipe):
    """Every completion is cut off in it, and the recipe's rewards are not asked."""
    rewards = ["reward.functions=[correct, nowhere:judge]", "reward.combine=normalise_each"]
    loop = prepare(make_recipe("method.truncated=mask", *rewards, "data.max_prompt_tokens=64")).loop
    metrics = loop.step(TrainState()).metrics
    assert metrics["length/truncated_share"] == 1.0 and metrics["update/grad_norm"] > 0.0


def test_the_advice_agrees_with_a_recipe_that_fits():
    """A batch larger than an iteration fits as well, and a completion that fills the context cannot be longer."""
    recipe = load_recipe(TINY)  # 128 completions an iteration, batches of up to 512, completions of up to 32 tokens
    said = suggestion(Advice(8192, 128, 32, 32, 32), recipe).splitlines()
    assert said[2].endswith("128    (the recipe has 512, which fits too: an iteration samples 128 completions in all)")
    assert said[-1] == "completions cannot be longer: the model's context leaves 32 tokens after the longest prompt"
    said = suggestion(Advice(8192, 64, 32, 40, 900), recipe).splitlines()
    assert said[2].endswith("batch_size=64    (the recipe has 512)")
    assert said[-1].endswith("one group sampled at once, completions of 40 tokens would fit")
    said = suggestion(Advice(8192, 64, 32, 900, 900), recipe)
    assert said.endswith(
        "completions of 900 tokens would fit, all that the model's context leaves after the longest prompt"
    )


def test_a_worst_iteration_for_real(capsys):
    """On the bundled model: every stage measured, no completion ended early, and the recipe's sizes reached."""
    small = ["rollout.prompts_per_iteration=2", "rollout.completions_per_prompt=2", "training.updates_per_iteration=2"]
    small += ["data.max_prompt_tokens=64", "logging.progress=false"]
    assert run_command(preflight.main, [str(TINY), *small]) == 0
    printed = capsys.readouterr().out
    assert "4 completions sampled at once, prompts of 64 and completions of 32 tokens" in printed
    seconds = next(line for line in printed.splitlines() if line.startswith("seconds an iteration")).split()[3:]
    assert len(seconds) == 3 and float(seconds[0]) > 0 < float(seconds[2])
    assert "largest settings that fit:" in printed
