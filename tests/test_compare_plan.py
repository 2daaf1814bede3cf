"""The plan of a comparison: which runs it consists of, and what is wrong with a file that makes none."""

from __future__ import annotations

import datetime
import shutil

import pytest
import yaml

from hapo_lite.compare.arms import on_one_day
from hapo_lite.compare.plan import load_comparison, planned_runs
from hapo_lite.errors import UserError
from hapo_lite.recipe import load_recipe
from hapo_lite.runs.folder import with_date
from tests.comparisons import ABOUT, write_comparison
from tests.conftest import TINY


def test_arms_differ_in_what_they_say_and_in_nothing_else(tmp_path):
    runs = planned_runs(load_comparison(write_comparison(tmp_path)))
    assert [run.name for run in runs] == ["dapo-seed0", "hapo-seed0", "dapo-seed1", "hapo-seed1"]
    dapo, hapo = (run.recipe for run in runs[:2])
    assert (dapo.method.preset, hapo.method.preset, hapo.method.tau) == ("dapo", "hapo", 0.5)
    same = {"method", "name"}
    assert dapo.model_dump(exclude=same) == hapo.model_dump(exclude=same)
    assert (dapo.training.max_tokens, dapo.training.iterations) == (1000, 240)
    assert dapo.model_dump(exclude={"name", "seed"}) == runs[2].recipe.model_dump(exclude={"name", "seed"})


def test_the_recipe_is_found_beside_the_comparison_and_kept_with_it(tmp_path):
    shutil.copy(TINY, write_comparison(tmp_path).parent)
    comparison = load_comparison(write_comparison(tmp_path, recipe=TINY.name))
    again = write_comparison(tmp_path, **yaml.safe_load(comparison.to_yaml()))
    assert comparison.recipe["model"]["name"] == "tiny" and load_comparison(again) == comparison


def test_overrides_reach_the_comparison_its_arms_and_the_recipe(tmp_path):
    comparison = load_comparison(
        write_comparison(tmp_path),
        ["seeds=[7]", "arms.hapo.method.tau=0.25", "training.learning_rate=1e-4", "max_iterations=9"],
    )
    recipes = [run.recipe for run in planned_runs(comparison)]
    assert [r.training.learning_rate for r in recipes] == [1e-4, 1e-4]
    assert [(r.seed, r.training.iterations) for r in recipes] == [(7, 9), (7, 9)]


def test_a_setting_for_all_arms_holds_in_an_arm_that_names_a_preset(tmp_path):
    """`method: hapo` of an arm says where the arm starts. It undoes no `method.floor` that is set for all of them."""
    comparison = load_comparison(write_comparison(tmp_path), ["method.floor=1e-6", "method.tau=0.25"])
    dapo, hapo = (run.recipe.method for run in planned_runs(comparison)[:2])
    assert (dapo.preset, dapo.floor, dapo.tau) == ("dapo", 1e-6, 0.25)
    assert (hapo.preset, hapo.floor, hapo.tau) == ("hapo", 1e-6, 0.5)  # The arm's own tau is the last word.


def test_runs_on_both_sides_of_midnight_ask_on_the_same_day(tmp_path):
    """The day is that of the run's own folder, else of the first run that has written one down."""
    runs = planned_runs(load_comparison(write_comparison(tmp_path)))

    def write_day(run, day):
        run.recipe.run_dir.mkdir(parents=True)
        dated = with_date(run.recipe, day and datetime.date.fromisoformat(day))
        (run.recipe.run_dir / "recipe.yaml").write_text(dated.to_yaml())

    assert on_one_day(runs[0], runs) == runs[0].recipe
    write_day(runs[0], None)  # Its template reads no date.
    assert on_one_day(runs[1], runs) == runs[1].recipe
    write_day(runs[1], "2020-02-29")
    write_day(runs[2], "2020-03-01")
    days = [on_one_day(run, runs).model.chat_template_date for run in runs]
    assert [str(day) for day in days] == ["2020-02-29", "2020-02-29", "2020-03-01", "2020-02-29"]


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("arms={a: {method: dapo}, b: {method: hapo}}", ""),
        ("arms.hapo.method.tau=0.1", ""),
        ("tokens=500", ABOUT),
        ("seeds=[3]", ABOUT),
    ],
)
def test_what_the_file_says_of_its_arms_is_not_said_of_others(tmp_path, override, kept):
    file = write_comparison(tmp_path)
    assert load_comparison(file, [override]).about == kept
    assert load_comparison(file, [override, "about=Mine."]).about == "Mine."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"dapo": {}}}, "arms must hold at least two"),
        ({"arms": None}, "is the recipe of one run|arms is missing"),
        ({"reference": "dappo"}, "'dappo' is not one of the arms; did you mean dapo"),
        ({"seeds": []}, "seeds must hold at least one"),
        ({"seeds": [1, 1]}, "a repeated seed repeats its runs"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokns": 5}, "tokns is not a field; did you mean tokens"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"recipe": "nowhere.yaml"}, "there is no recipe at .*nowhere.yaml"),
        ({"arms": {"a/b": {}, "b": {}}}, "arms: 'a/b' must be of letters"),
        ({"arms": {"a": {}, "b": {"evaluation.samples": 2}}}, r"arms.b: evaluation.samples must be the same"),
        ({"arms": {"a": {}, "b": {"data": {"limit": 2}}}}, r"arms.b: data.limit must be the same for all arms"),
        ({"arms": {"a": {}, "b": {"seed": 2}}}, r"arms.b: seed is not set here: use seeds"),
        ({"settings": {"training.max_tokens": 2}}, r"settings: training.max_tokens is not set here: use tokens"),
        ({"settings": {"evaluation.prompts": 0}}, "nothing to compare by"),
        ({"settings": {"training.schedule": "cosine"}}, "must be constant with training.max_tokens"),
        ({"arms": {"a": {}, "b": {"method.tao": 0.1}}}, r"arm b: method.tao is not a field; did you mean method.tau"),
        ({"arms": {"a": {}, "b": {"method": "happo"}}}, "did you mean hapo"),
        ({"arms": {"a": {}, "b": 3}}, "arms.b = 3"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        planned_runs(load_comparison(write_comparison(tmp_path, **changes)))
    assert "\n" not in str(error.value)


def test_each_command_names_the_other(tmp_path):
    with pytest.raises(UserError, match=r"is the recipe of one run: use python -m hapo_lite.train"):
        load_comparison(TINY)
    with pytest.raises(UserError, match=r"compares several runs: use python -m hapo_lite.compare"):
        load_recipe(write_comparison(tmp_path))
