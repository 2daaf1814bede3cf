"""What `pip install .` gives to a user without a checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hapo_lite.cli import program_name
from hapo_lite.compare.plan import load_comparison
from hapo_lite.errors import UserError
from hapo_lite.preflight.__main__ import main as preflight
from hapo_lite.recipe import load_recipe
from tests.conftest import ROOT, TINY

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "hapo_lite", "recipes", "docs")
"""What the build reads."""
LOOK = """
import json, pathlib
from importlib.metadata import distribution
import hapo_lite
from hapo_lite import *

installed = distribution("hapo_lite")
scripts = {script.name: script.load() for script in installed.entry_points}
print(json.dumps({
    "package": hapo_lite.__file__,
    "public": [name for name in hapo_lite.__all__ if name not in globals()],
    "scripts": [name for name, command in scripts.items() if callable(command)],
    "files": [str(file) for file in installed.files],
    "requires": installed.requires,
    "urls": installed.metadata.get_all("Project-URL"),
    "recipe": hapo_lite.load_recipe("tiny_cpu").name,
}))
"""
"""A program for the installed package, which prints what it sees as JSON."""


def pins(name: str) -> dict[str, Requirement]:
    """The requirements of a requirements file by package name, without those of files that it includes."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    return {one.name.lower().replace("_", "-"): one for one in found}


def outside_their_ranges(wanted: list[str], pinned: dict[str, Requirement]) -> list[str]:
    """The pins that the ranges in `wanted` exclude."""
    wrong = []
    for requirement in map(Requirement, wanted):
        pin = pinned.get(requirement.name.lower().replace("_", "-"))
        version = re.search(r"==(.+)", str(pin.specifier)) if pin else None
        if version and not requirement.specifier.contains(version[1]):
            wrong.append(f"{requirement} excludes {pin}")
    return wrong


def test_the_dev_group_is_requirements_dev():
    group, pinned = PYPROJECT["dependency-groups"]["dev"], pins("requirements-dev.txt")
    assert {Requirement(line).name for line in group} == set(pinned)
    assert outside_their_ranges(group, pinned) == []


def test_the_pinned_versions_are_within_the_declared_ranges():
    assert outside_their_ranges(PYPROJECT["project"]["dependencies"], pins("requirements.txt")) == []
    assert outside_their_ranges(["torch<2"], pins("requirements.txt"))


def test_every_command_has_a_script():
    rooms = {path.parent.name for path in (ROOT / "hapo_lite").glob("*/__main__.py")}
    expected = {f"hapo-{room.replace('_', '-')}": f"hapo_lite.{room}.__main__:command" for room in rooms}
    assert PYPROJECT["project"]["scripts"] == expected


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("/env/bin/hapo-verify-resume", "hapo-verify-resume"),
        ("/checkout/hapo_lite/verify_resume/__main__.py", "python -m hapo_lite.verify_resume"),
        ("app.py", "python app.py"),
    ],
)
def test_help_names_the_program_that_was_typed(monkeypatch, typed, name):
    monkeypatch.setattr(sys, "argv", [typed])
    assert program_name("verify_resume") == name


def test_a_plain_name_stands_for_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny_cpu", ["seed=3"]) == load_recipe(TINY, ["seed=3"])
    assert load_comparison("compare_tiny") == load_comparison(ROOT / "recipes" / "compare_tiny.yaml")
    with pytest.raises(UserError, match=r"there is no recipe at tiny_cpuu; .* are .*compare_tiny, .*tiny_cpu"):
        load_recipe("tiny_cpuu")
    with pytest.raises(UserError, match=r"there is no recipe at tiny_cpu\.yaml"):
        load_recipe("tiny_cpu.yaml")
    with pytest.raises(UserError, match="there is no recipe at"):
        load_recipe("long" * 100)


def test_a_file_goes_before_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny_cpu").write_text(TINY.read_text("utf-8").replace("seed: 0", "seed: 7"), "utf-8")
    assert load_recipe("tiny_cpu").seed == 7


def test_a_shipped_recipe_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = TINY.read_bytes()
    with pytest.raises(UserError, match=r"copy the shipped .*tiny_cpu\.yaml"):
        preflight(["tiny_cpu", "--shape-only", "--card", "8", "--write"])
    assert TINY.read_bytes() == before


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the package built from a copy of the sources, beside the libraries of the running one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    # A copy, since the build writes beside the sources and would take up what an earlier one left there.
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    environment = folder / "env"
    venv.create(environment, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = environment / "lib" / version / "site-packages" / "libraries.pth"
    libraries.write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}), "utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "-q"]
    # The build uses the setuptools of the running environment: nothing is downloaded.
    pip += ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = run_alone([*pip, str(source)], folder)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return environment


def run_alone(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` without anything that would let it find the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_wheel_is_whole(installed, tmp_path):
    done = run_alone([str(installed / "bin" / "python"), "-c", LOOK], tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["package"]).is_relative_to(installed)
    assert found["public"] == [] and found["recipe"] == "tiny_cpu"
    assert set(found["scripts"]) == set(PYPROJECT["project"]["scripts"])
    assert all((installed / "bin" / script).is_file() for script in found["scripts"])
    carried = {name for name in found["files"] if name.startswith("hapo_lite/") and "__pycache__" not in name}
    kept = {path for path in (ROOT / "hapo_lite").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    recipes = {f"hapo_lite/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    pages = {f"hapo_lite/docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert carried == {str(path.relative_to(ROOT)) for path in kept} | recipes | pages
    required = {Requirement(line) for line in found["requires"]}
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert required >= {Requirement(line) for line in PYPROJECT["project"]["dependencies"]}
    assert required >= {Requirement(f"{line}; extra == '{name}'") for name, lines in extras.items() for line in lines}
    assert found["urls"] == ["Paper, https://arxiv.org/abs/2509.16591"]


@pytest.mark.slow
def test_the_wheel_trains(installed, tmp_path):
    settings = ["training.iterations=2", "evaluation.prompts=0", "rollout.prompts_per_iteration=2"]
    script = str(installed / "bin" / "hapo-train")
    done = run_alone([script, "tiny_cpu", "reward.workers=1", *settings], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny_cpu"
    assert json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["iteration"] == 2
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
