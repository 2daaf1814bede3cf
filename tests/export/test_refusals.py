"""What is not exported, and what is left of a run and of its folders then."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from hapo_lite.cli import run_command
from hapo_lite.export import __main__ as command
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.runs.checkpoint import file_hash
from hapo_lite.runs.files import replacing_folder
from tests.export.command import WEIGHTS, complaint, set_model


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
