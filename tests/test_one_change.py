"""A user changes one setting: the recipe loads, or one sentence names the setting and one change that mends it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from hapo_lite.algo.methods import PRESETS
from hapo_lite.compare.plan import load_comparison, planned_runs
from hapo_lite.errors import UserError
from hapo_lite.recipe import Recipe, parse_recipe, read_recipe_file
from hapo_lite.recipe.fields import leaves
from hapo_lite.recipe.settings import put
from tests.recipes import COMPARISONS, SHIPPED

FIELDS = {field.name: field for field in leaves(Recipe)} | {"evaluation.data": None, "method": None}
OFF = (False, None, 0, "none", "never")
"""What people write to switch something off; `off` is false in YAML."""
TYPES = {"null", "int", "float", "str", "bool", "list", "dict", "date"}

EVERYTHING_ON = """
model:
  {name: tiny, revision: main, trust_remote_code: true, gradient_checkpointing: true, activation_offload: true,
   chat_template_options: {thinks: true}, chat_template_date: 2020-02-29, lora: {targets: [q_proj]}}
data: {source: rows.jsonl, config: main, revision: main, problem_column: p, answer_column: a, limit: 99}
reward: {function: "mine:score", overlong_buffer: 8, overlong_penalty: 0.5}
rollout:
  {top_p: 0.9, top_k: 20, dynamic_sampling: true, token_budget: 9999, unpacked_base: always, old_logprobs: sampled}
method:
  {preset: hapo, low_side: positive, neutral_zone: adapted, adaptive_clip: false, eps_uncertain: 0.5,
   loss_average: sequence, uncertain_among: completion, entropy_scale: true, entropy_bonus: 0.4, kl_certain: 0.001,
   kl_uncertain: 0.001, importance: truncated, token_share: 0.5, covariance_share: 0.001, surprisal_factor: 1.1}
training: {iterations: 9, max_tokens: 9999, weight_decay: 0.1, optimizer: adamw_8bit}
evaluation: {data: {source: held_out.jsonl, system_prompt: null}}
benchmark: {suites: [tiny], limit: 9, max_new_tokens: 99}
logging: {report_to: tensorboard}
"""
WIDE = """
model: {name: tiny}
data: {source: tiny}
method: {preset: hapo_public_code, eps_low: 0.6}
training: {iterations: 1}
"""

REFUSED = {
    "data.curriculum": "an order by pass rates needs the file that has them",
    "method": "truncated sampling needs an importance weight, and the preset has none",
    "method.preset": "one piece of the preset does not go with another that the recipe sets itself",
    "method.importance": "truncated sampling without its weight has a biased gradient, in silence",
    "method.low_side": "with eps_low = 0.6 the lower bound on a ratio would lie below 0",
    "method.surrogate": "the ratio of a completion takes all its tokens, and a share of them is computed",
    "reward.combine": "rewards are normalised within a list of them, and there is no list",
    "reward.correct": "without a difference between right and wrong there is nothing to learn",
    "reward.functions": "a word is taken as the name of a reward, and none has that name",
    "rollout.completions_per_prompt": "a group of one has no advantage",
    "training.schedule": "a schedule needs a number of updates, which a limit of tokens does not give",
}
"""Settings for which a value of the right type is refused beside another setting, and why no value could be assumed."""
HELD_OUT = {name for name in FIELDS if name.startswith("evaluation.data.")}
"""Where there is no held-out data yet, one of its settings is refused with the sentence that asks for its source."""
PASS_RATES = {name for name in FIELDS if name.startswith("data.pass_rate.")}
"""The same where there are no pass rates, with the sentence that asks for their file."""
OF_COMPARISONS = {
    "data.curriculum": REFUSED["data.curriculum"],
    "method": "the same for a piece that an arm sets",
    "method.preset": REFUSED["method.preset"],
    "evaluation.prompts": "there is nothing to compare by",
    "reward.combine": REFUSED["reward.combine"],
    "reward.correct": REFUSED["reward.correct"],
    "reward.functions": REFUSED["reward.functions"],
    "rollout.completions_per_prompt": REFUSED["rollout.completions_per_prompt"],
    "seed": "runs differ in it",
    "training.max_tokens": "the comparison's tokens decide",
    "training.schedule": REFUSED["training.schedule"],
}
"""The same for comparisons, where a change is one of all arms."""


def changes(key: str) -> Iterator[Any]:
    """Values for a setting: what switches it off, and every choice of an enumeration."""
    field = FIELDS[key]
    yield from OFF
    if key in ("method", "method.preset"):
        yield from PRESETS
    elif field is not None:
        yield from sorted(set(field.kind.split(" | ")) - TYPES)


def changed(settings: dict[str, Any], key: str, value: Any) -> Recipe | str:
    """The recipe with one change, or the sentence that refuses it."""
    settings = copy.deepcopy(settings)
    try:
        put(Recipe, settings, key, value, f"{key}={value}")
        return parse_recipe(settings)
    except UserError as error:
        return str(error).removeprefix("recipe: ")


def says_which(sentence: str, key: str) -> bool:
    """Whether a sentence names a setting; those of a method are named within `method:`."""
    if key in ("method", "method.preset"):  # The pieces that the preset brings are named.
        return sentence.startswith("method: ") or "method." in sentence
    section, _, last = key.rpartition(".")
    return key in sentence or (section == "method" and sentence.startswith("method: ") and last in sentence)


def about_itself(sentence: str, key: str) -> bool:
    """Whether a sentence is about the type or the bounds of one setting, and names no other one."""
    starts = [f"{key} = ", f"{key}: "] + [f"method: {key.rpartition('.')[2]} = "] * key.startswith("method.")
    others = [name for name in FIELDS if name != key and re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", sentence)]
    return sentence.startswith(tuple(starts)) and not [name for name in others if "." in name]


def remedies(sentence: str) -> list[Any]:
    """The values that a sentence about a type or about bounds offers."""
    found: list[Any] = [None] if sentence.endswith(", or null") else []
    found += [int(n) for n in re.findall(r"greater than or equal to (\d+)", sentence)]
    found += [int(n) + more for n in re.findall(r"greater than (\d+)", sentence) for more in (0.5, 1)]
    found += [int(n) + 0.25 for n in re.findall(r"a number above (\d)", sentence)]
    found += [int(n) for n in re.findall(r"a number (\d) (?:to|or more)", sentence)]
    choices = re.search(r"input should be ('.*)", sentence)
    return found + (re.findall(r"'([^']*)'", choices[1]) if choices else [])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_one_change_of_a_shipped_recipe_loads_or_says_how(path):
    """What the sentence offers loads, in the same recipe."""
    settings = read_recipe_file(path)
    refused = set()
    for key in FIELDS:
        for value in changes(key):
            found = changed(settings, key, value)
            if isinstance(found, Recipe):
                assert parse_recipe(found.model_dump()) == found
            elif about_itself(found, key):
                offered = [changed(settings, key, remedy) for remedy in remedies(found)]
                assert not offered or any(isinstance(recipe, Recipe) for recipe in offered), (found, offered)
            else:
                assert says_which(found, key) and "\n" not in found, (key, value, found)
                refused.add(key)
    assert refused - HELD_OUT - PASS_RATES <= set(REFUSED)


def test_with_everything_on_each_thing_can_be_switched_off():
    refused = set()
    for text in (EVERYTHING_ON, WIDE):
        settings = yaml.safe_load(text) | {"name": "x"}
        assert isinstance(changed(settings, "seed", 0), Recipe)
        for key in FIELDS:
            for value in changes(key):
                found = changed(settings, key, value)
                if isinstance(found, str) and not about_itself(found, key):
                    assert says_which(found, key), (key, value, found)
                    refused.add(key)
    assert refused - HELD_OUT - PASS_RATES == set(REFUSED)


def test_what_may_be_null_says_so_when_it_is_switched_off_in_another_way():
    """0, false and none are refused with the way to write it, or they do what null does."""
    settings = yaml.safe_load(EVERYTHING_ON) | {"name": "x"}
    for key, field in FIELDS.items():
        if field is None or not field.may_be_null or key.startswith("evaluation.data"):
            continue
        for value in (False, 0):
            found = changed(settings, key, value)
            assert isinstance(found, str) and found.endswith(", or null"), (key, value, found)
    recipe = changed(settings, "data.system_prompt", "none")
    assert isinstance(recipe, Recipe) and any("write null for no system message" in note for note in recipe.advice())


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_one_change_of_a_shipped_comparison_plans_its_runs_or_says_how(path):
    comparison = load_comparison(path, ["seeds=[0]"])
    refused = set()
    for key in FIELDS:
        if key in ("name", "output_dir"):
            continue  # The comparison's own.
        for value in changes(key):
            settings = {**comparison.settings, key: value}
            try:
                planned_runs(comparison.model_copy(update={"settings": settings}))
            except UserError as error:
                sentence = re.sub(r"^[\w, +-]*?: ", "", str(error))
                if not about_itself(sentence, key):
                    assert says_which(sentence, key), (key, value, sentence)
                    refused.add(key)
    assert refused - HELD_OUT - PASS_RATES <= set(OF_COMPARISONS)
