"""Nothing is written or read outside of where it belongs: run folders, links in them."""

from __future__ import annotations

import pytest

from hapo_lite.errors import UserError
from hapo_lite.evaluate.evaluation import evaluate
from hapo_lite.export.export import export
from hapo_lite.recipe import load_recipe
from hapo_lite.runs.folder import RunFolder, check_place
from hapo_lite.train import run
from tests.conftest import TINY

SECRET = "nobody-may-see-this"


@pytest.fixture
def elsewhere(tmp_path):
    """A folder outside the runs, whose files must stay as they are."""
    folder = tmp_path / "elsewhere"
    (folder / "000001").mkdir(parents=True)
    for name in ("000001.jsonl", "000001/state.json", "mine.txt"):
        (folder / name).write_text(SECRET)
    yield folder
    left = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert left == dict.fromkeys(("000001.jsonl", "000001/state.json", "mine.txt"), SECRET)


LINKS = [
    "checkpoints",
    "traces",
    "adapter",
    "replay",
    "status.json",
    "metrics.jsonl",
    "evaluations/tiny",
    "traces/000001.jsonl",
]


@pytest.mark.parametrize("link", ["", *LINKS])
@pytest.mark.parametrize("command", [run.train, evaluate])
def test_links_out_of_a_run_are_refused_before_anything_is_written(make_recipe, elsewhere, link, command):
    recipe = make_recipe()
    place = recipe.run_dir / link
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere / "mine.txt" if "." in link else elsewhere)
    if link:
        (recipe.run_dir / "recipe.yaml").write_text("as it was")
    with pytest.raises(UserError, match="leads out of"):
        command(recipe)
    if link:
        assert (recipe.run_dir / "recipe.yaml").read_text() == "as it was"


def test_an_export_does_not_follow_a_link_out_of_the_run(make_recipe, elsewhere):
    recipe = make_recipe()
    (recipe.run_dir / "adapter").mkdir(parents=True)
    (recipe.run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (recipe.run_dir / "adapter" / name).write_text("{}")
    (recipe.run_dir / "export").symlink_to(elsewhere)
    with pytest.raises(UserError, match="leads out of"):
        export(recipe.run_dir, "adapter")


def test_a_link_within_a_run_and_runs_that_lie_on_another_disk_are_fine(make_recipe, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    folder = RunFolder(make_recipe().run_dir)
    folder.traces.mkdir(parents=True)
    (folder.path / "newest").symlink_to("traces")
    check_place(folder)


@pytest.mark.parametrize("command", [run.train, evaluate])
def test_a_folder_that_is_no_run_is_left_alone(make_recipe, tmp_path, elsewhere, command):
    with pytest.raises(UserError, match="holds other things than a run"):
        command(make_recipe(f"output_dir={tmp_path}", "name=elsewhere"))


@pytest.mark.parametrize(
    "override",
    [
        "name=../out",
        "name=/etc",
        "name=..",
        "../name=x",
        "name.../x=y",
        "benchmark.suites=[{name: ../x, source: f.csv}]",
    ],
)
def test_no_override_leads_out_of_the_folder_of_runs(override):
    with pytest.raises(UserError, match=r"one folder name|is not a field|single value"):
        load_recipe(TINY, [override])
