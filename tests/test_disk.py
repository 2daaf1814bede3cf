"""What a disk does to a run: full, read-only, damaged, foreign. Each is named, and the last good state is kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.recipe import load_recipe
from hapo_lite.runs.checkpoint import newest_good, read_record
from hapo_lite.runs.files import file_hash
from hapo_lite.runs.lines import MetricsFile
from hapo_lite.train.__main__ import main
from hapo_lite.verify_resume.verify import left_by
from tests.conftest import TINY

SHORT = [
    "rollout.prompts_per_iteration=2",
    "rollout.completions_per_prompt=2",
    "training.updates_per_iteration=2",
    "data.limit=64",
    "evaluation.prompts=2",
    "evaluation.samples=1",
    "evaluation.every=1",
    "checkpoint.every=1",
    "reward.workers=1",
    "logging.progress=false",
    "logging.traces_per_iteration=1",
]


def arguments(folder: Path, iterations: int, *overrides: str) -> list[str]:
    return [str(TINY), f"output_dir={folder}", *SHORT, f"training.iterations={iterations}", *overrides]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A run of three iterations that nothing befell, with checkpoints 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    assert run_command(main, arguments(folder, 3)) == 0
    return folder / "tiny_cpu"


def complaint(capsys, *given) -> str:
    capsys.readouterr()
    assert run_command(main, arguments(*given)) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@contextlib.contextmanager
def only_left(disk: Path, bytes_left: int):
    """The disk filled up to so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    ballast.write_bytes(bytes(free - bytes_left))
    try:
        yield
    finally:
        ballast.unlink()


def test_a_full_disk_is_named_and_costs_nothing_that_was_saved(small_disk, three, capsys):
    assert run_command(main, arguments(small_disk, 1)) == 0
    run = small_disk / "tiny_cpu"
    first = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    refused = []
    for kilobytes in (0, 16, 64, 256):
        with only_left(small_disk, kilobytes << 10):
            line = complaint(capsys, small_disk, 3)
        assert re.search(r"(could not|cannot) be written: the disk is full; free some space", line), line
        refused.append(line)
        assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == first
        assert not list(run.rglob(".writing-*"))
    assert "tiny_cpu cannot" in refused[0] and "checkpoints/000002 could not" in refused[-1]
    assert run_command(main, arguments(small_disk, 3)) == 0
    assert left_by(small_disk) == left_by(three.parent)


def test_a_read_only_folder_is_named(small_disk, three, capsys):
    shutil.copytree(three, small_disk / "tiny_cpu")
    before = left_by(three.parent)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = complaint(capsys, small_disk, 4)
    assert "status.json cannot be written: Read-only file system; check the folder" in line
    assert left_by(small_disk) == before


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def with_another_place_in_the_data(path: Path) -> None:
    """Still JSON, still whole."""
    record = json.loads(path.read_text())
    record["state"]["cursor"] += 1
    path.write_text(json.dumps(record))


def of_another_version(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


def of_another_recipe(path: Path) -> None:
    """As if the folder had been copied from another run: all its hashes are right."""
    from hapo_lite.runs.checkpoint import _digest

    record = json.loads(path.read_text())
    record["recipe"]["training"]["learning_rate"] = 1.0
    del record["sha256"]
    path.write_text(json.dumps(record | {"sha256": _digest(record)}))


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("adapter_model.safetensors", flip_a_byte, "is damaged: adapter_model.safetensors has changed"),
        ("optimizer.pt", cut_in_half, "is damaged: optimizer.pt has changed"),
        ("optimizer.pt", Path.unlink, "is damaged: optimizer.pt is missing"),
        ("state.json", flip_a_byte, "is damaged: "),
        ("state.json", with_another_place_in_the_data, "is damaged: state.json has changed since it was written"),
        ("state.json", cut_in_half, "is damaged: JSONDecodeError"),
        ("state.json", Path.unlink, "is damaged: state.json is missing"),
        ("state.json", of_another_version, "has version 99; this program reads 2"),
        ("state.json", of_another_recipe, "training.learning_rate = 1.0, the recipe now says 0.0005"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_named_and_the_one_before_it_used(three, tmp_path, file, damage, named):
    shutil.copytree(three, tmp_path / "tiny_cpu")
    folder = tmp_path / "tiny_cpu" / "checkpoints"
    damage(folder / "000003" / file)
    recipe = load_recipe(*split(arguments(tmp_path, 3)))
    newest, [complaint] = newest_good(folder, recipe)
    assert newest is not None and newest.path == folder / "000002"
    assert str(folder / "000003") in complaint and named in complaint


def test_a_resumed_run_reads_its_checkpoint_once(three, tmp_path, monkeypatch):
    """Its hashes take as long as its bytes."""
    shutil.copytree(three, tmp_path / "tiny_cpu")
    read: list[Path] = []

    def hashed(path: Path) -> str:
        read.append(path)
        return file_hash(path)

    monkeypatch.setattr("hapo_lite.runs.checkpoint.file_hash", hashed)
    assert run_command(main, arguments(tmp_path, 3)) == 0
    assert len(read) == len(set(read)) > 2 and {path.parent.name for path in read} == {"000003"}


def split(given: list[str]) -> tuple[str, list[str]]:
    return given[0], given[1:]


def test_every_digit_of_the_state_is_held(three, tmp_path):
    """A number that has changed is no longer that of the run, though the file still reads well."""
    shutil.copytree(three / "checkpoints" / "000003", tmp_path / "000003")
    path = tmp_path / "000003" / "state.json"
    path.write_text(path.read_text().replace('"cursor": 6', '"cursor": 7'))
    with pytest.raises(UserError, match=r"state.json has changed since it was written"):
        read_record(path.parent)


def test_none_of_the_checkpoints_can_be_used(three, tmp_path, capsys):
    shutil.copytree(three, tmp_path / "tiny_cpu")
    for state in (tmp_path / "tiny_cpu" / "checkpoints").rglob("state.json"):
        cut_in_half(state)
    line = complaint(capsys, tmp_path, 3)
    assert "can be used: move the folder away to start over" in line and "000003 is damaged" in line


def test_records_without_their_checkpoints_are_not_deleted(three, tmp_path, capsys):
    run = tmp_path / "tiny_cpu"
    shutil.copytree(three, run, ignore=shutil.ignore_patterns("checkpoints"))
    before = left_by(tmp_path)
    line = complaint(capsys, tmp_path, 3)
    assert "holds the records of a run to its end and no checkpoint to go on from" in line
    assert "training.learning_rate" in complaint(capsys, tmp_path, 3, "training.learning_rate=1")
    assert "holds a run already" in complaint(capsys, tmp_path, 3, "checkpoint.resume=never")
    assert left_by(tmp_path) == before
    (run / "summary.json").unlink()
    assert "records of a run up to iteration 3 and no checkpoint" in complaint(capsys, tmp_path, 3)
    (run / "recipe.yaml").unlink()
    assert "recipe.yaml, which the run is to be continued from, cannot be read" in complaint(capsys, tmp_path, 3)


def test_a_run_that_has_no_checkpoint_yet_starts_again_under_its_own_recipe(three, tmp_path, capsys):
    run = tmp_path / "tiny_cpu"
    shutil.copytree(three, run, ignore=shutil.ignore_patterns("checkpoints", "summary.json", "adapter", "curves.png"))
    MetricsFile(run / "metrics.jsonl").keep_up_to(1)
    before = left_by(tmp_path)
    assert "was made with training.learning_rate" in complaint(capsys, tmp_path, 3, "training.learning_rate=1")
    assert "holds a run already" in complaint(capsys, tmp_path, 3, "checkpoint.resume=never")
    assert left_by(tmp_path) == before
    assert run_command(main, arguments(tmp_path, 3)) == 0
    assert "no checkpoint yet: the run starts again, and what it recorded up to iteration 1" in capsys.readouterr().out
    assert left_by(tmp_path) == left_by(three.parent)


def test_data_that_have_changed_do_not_continue_the_run(tmp_path, capsys):
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    file = tmp_path / "rows.jsonl"
    mine = (f"data.source={file}", "evaluation.prompts=2")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_command(main, arguments(tmp_path, 1, *mine)) == 0
    rows[3]["answer"] = "7"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = complaint(capsys, tmp_path, 2, *mine)
    assert "the training prompts are others than when" in line and "000001 was written" in line


def test_a_file_that_nobody_may_write_is_reported(capsys, tmp_path):
    run = tmp_path / "tiny_cpu"
    run.mkdir()
    (run / "metrics.jsonl").mkdir()
    assert "cannot be written" in complaint(capsys, tmp_path, 1)
