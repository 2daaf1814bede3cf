"""Settings as people write them: other kits' names, half a name, switched off, after an option, with a ~."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hapo_lite import cli
from hapo_lite.cli import CommandParser, run_command
from hapo_lite.errors import UserError
from hapo_lite.preflight.__main__ import main as preflight
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.recipe.elsewhere import OURS, answer_for
from hapo_lite.recipe.fields import leaves
from hapo_lite.train.__main__ import main as train
from tests.conftest import ROOT, TINY

FIELDS = {field.name for field in leaves(Recipe)}
SECTIONS = {name.split(".")[0] for name in FIELDS if "." in name}


@pytest.mark.parametrize("name", OURS)
def test_every_answer_names_settings_that_there_are(name):
    answer = answer_for(name)
    for named in re.findall(rf"\b(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+", answer):
        assert named in FIELDS or any(field.startswith(f"{named}.") for field in FIELDS), named
    assert name not in FIELDS, "a setting of our own needs no answer"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("num_generations=8", "num_generations is not a field; here it is rollout.completions_per_prompt"),
        ("rollout.num_generations=8", "here it is rollout.completions_per_prompt"),
        ("training.beta=0.04", "here it is method.kl_certain"),
        ("per_device_train_batch_size=4", "here it is training.micro_batch_tokens"),
        (
            "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref.rollout.n is not a field; here it is rollout.completions_",
        ),
        ("actor_rollout_ref.actor.clip_ratio_high=0.3", "here it is method.eps_high"),
        ("actor_rollout_ref.rollout.name=vllm", "here it is rollout.engine"),
        ("algorithm.filter_groups.enable=true", "here it is rollout.dynamic_sampling"),
        ("trainer.something=1", "trainer is a section of verl"),
        ("lora_dropout=0.1", "hapo_lite has no such setting: with dropout"),
        ("chat_template_kwargs.enable_thinking=false", "here it is model.chat_template_options"),
    ],
)
def test_a_setting_of_another_kit_is_answered_with_ours(override, answer, write_recipe):
    with pytest.raises(UserError, match=re.escape(answer)):
        load_recipe(TINY, [override])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("iterations=5", "training.iterations"),
        ("lora.rank=8", "model.lora.rank"),
        ("rollout.iterations=5", "training.iterations"),
        ("targets=[q_proj]", "model.lora.targets"),
        ("temperature=1", "rollout.temperature or evaluation.temperature or benchmark.temperature"),
    ],
)
def test_half_a_name_is_answered_with_the_whole(override, meant):
    with pytest.raises(
        UserError, match=re.escape(f"{override.partition('=')[0]} is not a field; did you mean {meant}?")
    ):
        load_recipe(TINY, [override])


@pytest.mark.parametrize(
    ("override", "blamed"),
    [
        ("num_generations=8", "the command line: num_generations is not"),
        ("lora.rank=8", "the command line: lora.rank is not"),
        ("rollout={temperature: -1}", "the command line: rollout.temperature = -1"),
        ("method=hopo", "the command line: method"),
        ("training.iterations=5", "{file}: rollout.bogus is not"),
        ("rollout.temperature=0.5", "{file}: rollout.bogus is not"),
    ],
)
def test_a_wrong_setting_is_blamed_on_the_file_or_on_the_command_line(tmp_path, override, blamed):
    file = tmp_path / "mine.yaml"
    text = TINY.read_text()
    file.write_text(text.replace("\nrollout:\n", "\nrollout:\n  bogus: 1\n") if "{file}" in blamed else text)
    with pytest.raises(UserError) as caught:
        load_recipe(file, [override])
    assert str(caught.value).startswith(blamed.format(file=file))


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--num_generations=8", "--num_generations is not an option; here it is rollout.completions_per_prompt"),
        ("--num-generations", "here it is rollout.completions_per_prompt"),
        ("--training.iterations=5", "settings are written without dashes, training.iterations=5"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_a_setting_written_as_an_option_is_answered(option, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        train([str(TINY), option])
    assert stop.value.code == 2
    assert answer in capsys.readouterr().err


def test_activations_are_not_moved_without_checkpointing():
    recipe = load_recipe(TINY, ["model.activation_offload=true"])
    assert not recipe.model.offloads and any("activation_offload" in note for note in recipe.advice())
    assert load_recipe(TINY, ["model.activation_offload=true", "model.gradient_checkpointing=true"]).model.offloads


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(
        TINY,
        [
            "output_dir=~/runs",
            "model.name=~/model",
            "data.source=~/rows.jsonl",
            "evaluation.data.source=~/held.jsonl",
            "reward.function=~/mine.py:score",
            "benchmark.suites=[mine=~/suite.jsonl, ~/other.jsonl]",
        ],
    )
    named = [recipe.output_dir, recipe.model.name, recipe.data.source, recipe.evaluation.data.source]
    named += [recipe.reward.function, *[suite.source for suite in recipe.benchmark.suites]]
    assert all(path.startswith("/home/someone/") for path in named), named
    assert recipe.run_dir == Path("/home/someone/runs/tiny_cpu")


def test_settings_may_follow_options(monkeypatch):
    seen = []
    monkeypatch.setattr("hapo_lite.preflight.preflight.preflight", lambda recipe, *rest: seen.append((recipe, *rest)))
    preflight([str(TINY), "--shape-only", "--card", "12", "seed=7", "rollout.batch_size=3"])
    [(recipe, card, shape_only, _)] = seen
    assert (recipe.seed, recipe.rollout.batch_size, card, shape_only) == (7, 3, 12 * 2**30, True)


def test_every_command_takes_settings_and_options_in_any_order():
    for path in sorted((ROOT / "hapo_lite").glob("*/__main__.py")):
        text = path.read_text(encoding="utf-8")
        assert "argparse.ArgumentParser(" not in text, path
        assert "recipe_parser(" in text or "CommandParser(" in text, path
    parser = CommandParser()
    parser.add_argument("first")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--flag", action="store_true")
    assert parser.parse_args(["a", "--flag", "b", "c"]).rest == ["b", "c"]


def test_a_command_starts_without_the_imports_that_take_long():
    """A Ctrl-C during them is met by `run_command`; before it, by nobody."""
    modules = [f"hapo_lite.{path.parent.name}.__main__" for path in (ROOT / "hapo_lite").glob("*/__main__.py")]
    script = (
        f"import sys, {', '.join(modules)}\n"
        "late = {'torch', 'numpy', 'pydantic', 'yaml', 'transformers', 'safetensors', 'hapo_lite.recipe'}\n"
        "print(sorted(late & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_ctrl_c_during_the_imports_is_a_sentence(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "quiet_libraries", interrupted)
    assert run_command(train, [str(TINY)]) == 130
    assert capsys.readouterr().err == "stopped before anything was done\n"
