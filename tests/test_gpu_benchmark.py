"""benchmarks/gpu.py: each part runs; one that is done is not done again, unless machine or kit are others."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_parts, memory
from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.unpacked import Unpacking
from hapo_lite.preflight.measure import prepare as prepare_on_cpu
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.train.memory.predict import Predictor
from tests.commands import own_precision
from tests.conftest import ROOT
from tests.test_shortage import SmallMemory


@pytest.fixture
def place(tmp_path, monkeypatch) -> gpu.Place:
    monkeypatch.setattr(gpu_parts, "DEVICE", "cpu")
    return gpu.Place("small", tmp_path)


def test_parts_are_done_once_and_the_page_has_them_all(tmp_path, monkeypatch):
    asked = []

    def run_part(name, place, seconds):
        asked.append(name)
        if name == "engines":
            return "it ended with exit code 1"
        record = {"machine": gpu.machine(), "seconds": 1.0, "figures": {"tokens/s": 1234.5, "kernel": "used"}}
        (place.folder / f"{name}.json").write_text(json.dumps(record))
        return None

    def page(*arguments: str) -> str:
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--shapes", "small", "--folder", str(tmp_path), *arguments])
        gpu.main()
        return (tmp_path / "small" / "gpu.md").read_text(encoding="utf-8")

    monkeypatch.setattr(gpu, "run_part", run_part)
    text = page("--parts", "head", "engines")
    assert asked == ["engines", "head"] and text.count("Left out: not asked for.") == len(gpu.PARTS) - 2
    assert "| tokens/s | 1,234 |" in text and "| kernel | used |" in text
    assert "Left out: it ended with exit code 1." in text
    page()
    assert asked == [name for name in gpu.PARTS if name != "head"]
    page()
    assert asked == ["engines"]
    parts = json.loads((tmp_path / "small" / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert parts["head"]["kernel"] == "used" and parts["engines"] == "it ended with exit code 1"
    monkeypatch.setattr(gpu, "kit", lambda: "another commit")
    page("--parts", "head")
    assert asked == ["head"]
    monkeypatch.setattr(gpu, "machine", lambda: {"card": "another"})
    page("--parts", "head")
    assert asked == ["head"]


def test_the_kit_is_its_commit_and_what_has_changed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    source = tmp_path / "hapo_lite" / "a.py"
    source.parent.mkdir()
    source.write_text("1")
    without = gpu.kit()
    assert without.startswith("without a commit, sources ")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    names = [without, gpu.kit()]
    assert re.fullmatch(r"[0-9a-f]{12}", names[-1])
    source.write_text("2")
    names.append(gpu.kit())
    (tmp_path / "hapo_lite" / "b.py").write_text("3")
    names.append(gpu.kit())
    assert all(name.startswith(f"{names[1]} with changes ") for name in names[2:]) and len(set(names)) == 4


def test_the_readme_stars_the_rows_that_have_a_part():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| part | has run | has not run |") :].partition("\n\n")[0].splitlines()[2:]
    starred = [row for row in table if row.startswith("| * ")]
    counted = re.search(r"measures (\d+) of these (\d+) parts", text)
    assert [int(n) for n in counted.groups()] == [len(starred), len(table)]
    assert all("GPU" in row.rsplit("|", 2)[1] for row in starred)
    rows = {row for part in gpu.PARTS.values() for row in part.rows}
    found = {row: [line for line in starred if line.startswith(f"| * {row}")] for row in rows}
    assert all(len(lines) == 1 for lines in found.values()) and len(found) == len(starred), found


def test_docs_name_every_part():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert [name for name in gpu.PARTS if f"\n| {name} |" not in text] == []


@pytest.mark.parametrize(("code", "word"), [(0, "are the same"), (3, "differ"), (2, None), (-9, None)])
def test_a_check_that_could_not_be_made_is_no_difference(tmp_path, monkeypatch, code, word):
    monkeypatch.setattr(gpu_parts, "run_module", lambda command: (code, 1.0))
    place = gpu.Place("small", tmp_path)
    if word is None:
        with pytest.raises(RuntimeError, match=f"could not be checked: exit code {code}"):
            gpu_parts.verify_resume(place)
    else:
        assert gpu_parts.verify_resume(place)["the resumed run's bytes"] == word


def test_recorded_steps_are_compared_and_a_refusal_is_a_figure(monkeypatch, make_recipe):
    recipe = make_recipe("rollout.prompts_per_iteration=2", "rollout.max_new_tokens=8", "data.limit=64")
    policy = load_policy(recipe.model, 0, "cpu")
    asked = []

    def recorder_for(setting, device):
        asked.append(setting)
        return None

    monkeypatch.setattr("hapo_lite.rollout.transformers_engine.recorder_for", recorder_for)
    figures = gpu_parts.recorded_steps(recipe, policy, 1)
    assert set(asked) == {"auto", "on"} and figures["recorded: completions that differ"] == 0

    def other_numbers(policy, size, longest, cuda_graphs):
        return type("Other", (TransformersEngine,), {"sample": sampled_elsewhere})(policy, size, longest)

    def sampled_elsewhere(engine, requests, processor, key):
        return TransformersEngine.sample(engine, requests, processor, replace(key, seed=key.seed + 1))

    monkeypatch.setattr("benchmarks.engines.TransformersEngine", other_numbers)
    assert gpu_parts.recorded_steps(recipe, policy, 1)["recorded: completions that differ"] > 0

    def refusing(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("benchmarks.engines.TransformersEngine", refusing)
    figures = gpu_parts.recorded_steps(recipe, policy, 1)
    assert figures["recorded: tokens/s"] == "operation not permitted when stream is capturing"


@pytest.mark.parametrize(("room", "counted"), [(0, False), (1 << 40, True)])
def test_the_prediction_is_told_the_room_that_the_run_has(place, monkeypatch, room, counted):
    """So a copy of the base is in the predicted figures where it is in the measured ones."""
    monkeypatch.setattr(memory, "room_of", lambda device: room)
    monkeypatch.setattr(memory, "prepare", lambda recipe: SimpleNamespace(loop=None))
    monkeypatch.setattr(memory, "measure_loop", lambda worst, say: None)
    monkeypatch.setattr(memory, "compare_methods", lambda loop, pairs: {})
    stages = memory.measure_training(place.recipe(), 1).stages
    assert ("unpacked base" in stages[0].parts) is counted


def test_commands_need_the_adapter_of_the_tiny_run(tmp_path):
    with pytest.raises(UserError, match="the part tiny has to come first"):
        gpu_parts.run_commands(gpu.Place("small", tmp_path))


def test_a_shortage_is_one_of_the_update_and_halves_it(tmp_path, monkeypatch):
    """On a card that says it has 8 GB: the limit lies between one sequence and all, and no copy of the base is made."""
    gpu_parts.memory.write_model(tmp_path, "small")
    monkeypatch.setattr(gpu_parts, "DEVICE", "cuda")
    card = SimpleNamespace(total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    made, limits = [], []

    def prepare(recipe):
        made.append(prepare_on_cpu(recipe))
        return made[0]

    def limit(fraction):
        limits.append(fraction * card.total_memory)
        SmallMemory(made[0].loop.policy, lambda tokens, learning: not learning or tokens <= 64)

    monkeypatch.setattr(gpu_parts, "prepare", prepare)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    place = gpu.Place("small", tmp_path)
    with own_precision():
        figures = gpu_parts.measure_shortage(place)
    assert made[0].loop.policy.dense.wanted is Unpacking.NEVER
    assert figures["shortages"] >= 1 and figures["steps skipped"] == 0
    assert figures["training.micro_batch_tokens that fitted"] <= 128
    packed = place.recipe("rollout.unpacked_base=never")
    update = Predictor(packed, "cuda").stages()[2].total
    assert 0.5 * update < limits[0] < update


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_training_engines_head_and_paged_states_are_measured_on_a_cpu(place):
    found = {}
    for name in ("training", "engines", "head", "paged"):
        with own_precision():
            found[name] = gpu.PARTS[name].work(place)
    training, engines = found["training"], found["engines"]
    for stage in ("rollout", "scoring", "update"):
        assert training[f"{stage}: predicted, MiB"] > 0 < training[f"{stage}: seconds an iteration"]
        # A process of many tests may have had the memory before: it then does not grow, and there is no ratio.
        grown = training[f"{stage}: measured, MiB"] > 0
        assert (f"{stage}: predicted / measured" in training) == grown
    assert training["hapo / dapo"] > 0
    assert engines["plain: tokens/s"] > 0
    for name in ("generate", "transformers", "paged"):
        assert engines[f"{name}: tokens/s"] > 0 < engines[f"{name} / plain"]
    assert engines["recorded: tokens/s"] > 0 < engines["recorded / transformers"]
    assert engines["recorded: completions that differ"] == 0
    assert found["head"]["Triton's kernel"] in ("used", "not used") and len(found["head"]) > 3
    assert found["paged"]["states"] > 0 and found["paged"]["steps skipped after the checkpoint was read"] == 0
    assert "skipped" in gpu.PARTS["fp16"].work(place) and "skipped" in gpu.PARTS["shortage"].work(place)


@pytest.mark.slow
def test_the_tiny_run_and_the_commands_on_its_adapter_run_on_a_cpu(place, monkeypatch):
    """In this process, since importing the libraries takes longer than most of the commands."""

    def run_here(command):
        room = importlib.import_module(command[0])
        if hasattr(room, "__path__"):
            room = importlib.import_module(f"{command[0]}.__main__")
        with own_precision():
            return run_command(room.main, command[1:]), 1.0

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_parts, "run_module", run_here)
    assert gpu.PARTS["tiny"].work(place)["verdict"]
    found = gpu.PARTS["commands"].work(place)
    names = {label.partition(":")[0] for label in found}
    assert names == {"probe", "evaluate", "export", "inspector, generation", "inspector, fork"}
    assert {name: found[f"{name}: exit code"] for name in names} == dict.fromkeys(names, 0)


def test_a_command_is_run_in_a_process_of_its_own():
    assert gpu_parts.run_module(["timeit", "-n", "1", "pass"])[0] == 0
    code, seconds = gpu_parts.run_module(["timeit", "-n", "1", "1 / 0"])
    assert code == 1 and seconds > 0
