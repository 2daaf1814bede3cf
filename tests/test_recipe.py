"""Recipes: every shipped one loads, and every mistake gets one sentence that names the place and the way out."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import yaml

from hapo_lite.algo.methods import PRESETS
from hapo_lite.compare.plan import load_comparison, planned_runs
from hapo_lite.errors import UserError
from hapo_lite.recipe import Recipe, describe_fields, first_incompatible_setting, load_recipe, rules, schema
from hapo_lite.recipe.settings import Section, apply_override
from tests.conftest import ROOT, TINY
from tests.recipes import COMPARISONS, MINIMAL, SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path, write_recipe):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert load_recipe(write_recipe(recipe.to_yaml())) == recipe
    assert not recipe.advice()


ON_A_CARD = [path for path in SHIPPED if path.stem not in ("tiny_cpu", "tiny_sums", "smollm2_gsm8k")]


@pytest.mark.parametrize("path", ON_A_CARD, ids=lambda p: p.stem)
def test_the_first_evaluation_takes_less_than_a_tenth_of_the_first_hour(path):
    """By the time of a step that the recipe's own comment estimates, with every batch as long as it may be."""
    recipe = load_recipe(path)
    estimate = re.search(
        r"^# An evaluation takes (\d+) completions in (\w+) batch\w* of up to ([\d,]+) steps of about (\d+) ms, "
        r"[\w ]+ minutes:\n# an estimate, not yet run on a card\.",
        path.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    completions, batches, steps, milliseconds = estimate.groups()
    wanted = recipe.evaluation.prompts * recipe.evaluation.samples
    needed = math.ceil(wanted / recipe.rollout.batch_size)
    assert (int(completions), batches) == (wanted, "one" if needed == 1 else str(needed))
    assert int(steps.replace(",", "")) == recipe.rollout.max_new_tokens
    assert needed * recipe.rollout.max_new_tokens * int(milliseconds) / 1000 < 360
    assert recipe.evaluation.prompts >= 32


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.stem)
def test_every_shipped_comparison_plans_its_runs(path):
    comparison = load_comparison(path)
    runs = planned_runs(comparison)
    assert len(runs) == len(comparison.arms) * len(comparison.seeds)
    assert len(comparison.seeds) >= 5 and not set(comparison.seeds) & set(range(100, 105))  # the setting's own seeds
    assert not [note for run in runs for note in run.recipe.advice()]
    assert len({str(run.recipe.method) for run in runs}) == len(comparison.arms)


def test_the_comparisons_hold_every_method_and_every_piece():
    methods = {path.stem: {r.recipe.method for r in planned_runs(load_comparison(path))} for path in COMPARISONS}
    assert methods["compare_tiny"] == set(PRESETS.values())
    assert methods["compare_sums"] >= set(PRESETS.values())
    assert methods["compare_sums"] >= methods["compare_smollm2"]
    pieces = ("adaptive_temperature", "token_level_advantage", "redistribution", "adaptive_clip")
    switches = {tuple(getattr(m, p) for p in pieces) for m in methods["ablation_tiny"]}
    one_by_one = {tuple(i == j for j in range(4)) for i in range(4)}
    assert switches == one_by_one | {tuple(j < n for j in range(4)) for n in range(5)}


def test_there_are_recipes_to_load():
    assert {p.stem for p in SHIPPED} >= {"tiny_cpu", "qwen1_5b_lora", "qwen7b_lora"}
    assert {p.stem for p in COMPARISONS} >= {"compare_tiny", "ablation_tiny"}


def test_overrides_reach_every_depth(write_recipe):
    path = write_recipe(MINIMAL)
    recipe = load_recipe(
        path, ["seed=7", "model.lora.rank=4", "data.system_prompt=null", "training.learning_rate=1e-4"]
    )
    assert (recipe.seed, recipe.model.lora.rank, recipe.data.system_prompt) == (7, 4, None)
    assert recipe.training.learning_rate == 1e-4


def test_held_out_prompts_are_worded_as_the_training_prompts_are(write_recipe):
    path = write_recipe(MINIMAL)
    other = ["evaluation.data.source=held_out.csv"]
    assert load_recipe(path, [*other, "data.system_prompt=null"]).evaluation.data.system_prompt is None
    assert load_recipe(path, [*other, "data.system_prompt=Add."]).evaluation.data.system_prompt == "Add."
    own = load_recipe(path, [*other, "data.system_prompt=Add.", "evaluation.data.system_prompt=null"])
    assert own.evaluation.data.system_prompt is None and own.data.system_prompt == "Add."
    default = load_recipe(path, other)
    assert default.evaluation.data.system_prompt == default.data.system_prompt


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_may_be_named_or_altered(write_recipe, name):
    path = write_recipe({**MINIMAL, "method": name})
    assert load_recipe(path).method == PRESETS[name]
    altered = load_recipe(path, ["method.tau=0.1"]).method
    assert altered.tau == 0.1 and altered.preset == name
    assert altered.adaptive_clip == PRESETS[name].adaptive_clip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temprature=1", r"rollout\.temprature is not a field; did you mean rollout\.temperature\?"),
        ("model.lora.rnk=1", r"did you mean model\.lora\.rank\?"),
        ("method.adaptive_clipp=true", r"did you mean method\.adaptive_clip\?"),
        ("learning_rate=1", r"did you mean training\.learning_rate or sft\.learning_rate\?"),
        ("rollout.temperature=hot", r"rollout\.temperature = 'hot': input should be a valid number"),
        ("training.iterations=1.5", r"training\.iterations = 1\.5"),
        ("training.iterations=0", r"training\.iterations = 0: input should be greater than or equal to 1"),
        ("model.dtype=int8", r"model\.dtype = 'int8': input should be 'auto', 'bf16'"),
        ("method=happo", r"method: preset 'happo' is not one of grpo, dapo, hapo, .*; did you mean hapo\?"),
        ("method.tau=3", r"method: tau = 3\.0 is out of range"),
        ("name=../elsewhere", "name: must be one folder name"),
        ("seed", "is not an override: write section.key=value"),
        ("seed.deeper=1", "seed.* is a single value, not a section"),
        ("seed=[1", "is not a YAML value"),
    ],
)
def test_mistakes_in_overrides(write_recipe, override, message):
    path = write_recipe({**MINIMAL, "seed": 0})
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path, [override])
    assert "\n" not in str(error.value)


def test_a_section_says_what_a_single_value_is_short_for():
    """settings.py knows no section by name, so another file than a recipe may have short forms of its own."""

    class Inner(Section):
        kind: str
        size: int = 1

    class Outer(Section):
        inner: Inner

        @classmethod
        def section_from_value(cls, name, value):
            return {"kind": value} if name == "inner" and isinstance(value, str) else value

    settings = {"inner": "round"}
    apply_override(Outer, settings, "inner.size=2")
    assert settings == {"inner": {"kind": "round", "size": 2}}
    with pytest.raises(UserError, match=r"'method\.tau=1': method is a single value, not a section"):
        apply_override(Outer, {"method": "hapo"}, "method.tau=1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "recipe.yaml:1: not valid YAML"),
        ("- a\n- b", "a recipe is a mapping of sections"),
        ("seed: 1\nseed: 2", "recipe.yaml:2: not valid YAML: the key 'seed' stands twice"),
        ("seed: &one 1\nname: *one", "recipe.yaml:2: not valid YAML: an alias"),
        ("model: {name: tiny}\ndata: {source: tiny}", r"training is missing"),
        ("model: {name: tiny}\ndata: {}\ntraining: {iterations: 1}", r"data\.source is missing"),
        ("a: &a [*a]", "recipe.yaml"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("[" * 5000, "recipe.yaml"),
    ],
)
def test_mistakes_in_files(write_recipe, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write_recipe(text))


def test_missing_file_names_its_nearest_neighbour(tmp_path):
    with pytest.raises(UserError, match=r"no recipe at .*tiny_cpuu\.yaml; did you mean .*tiny_cpu\.yaml\?"):
        load_recipe(TINY.parent / "tiny_cpuu.yaml")
    with pytest.raises(UserError, match="does not exist"):
        load_recipe(tmp_path / "nowhere" / "r.yaml")


ERRORS = [
    (
        rules.dora_is_sampled_by_the_policys_own_model,
        ["model.lora.variant=dora", "rollout.engine=vllm"],
        r"cannot be sampled by rollout\.engine=vllm, which has no DoRA: use rollout\.engine=transformers",
    ),
    (
        rules.groups_have_two_completions,
        ["rollout.completions_per_prompt=1"],
        "a group of one has no advantage",
    ),
    (
        rules.overlong_ramp_starts_after_the_first_token,
        ["reward.overlong_buffer=99999"],
        "every completion is overlong",
    ),
    (
        rules.every_update_has_a_completion,
        ["training.updates_per_iteration=9999"],
        "some updates would be empty",
    ),
    (rules.a_correct_answer_earns_more, ["reward.correct=0"], "wrong answers are what is learned"),
    (
        rules.a_correct_answer_earns_more,
        ["reward.functions=[correct, boxed]", "reward.wrong=2"],
        "wrong answers are what is learned",
    ),
    (
        rules.one_reward_or_a_list,
        ["reward.functions=[correct]", "reward.function=mine.py:score"],
        "put the one function into the list too",
    ),
    (
        rules.a_list_names_the_overlong_penalty,
        ["reward.functions=[correct]", "reward.overlong_buffer=8"],
        "add `overlong` to the list",
    ),
    (
        rules.a_list_names_the_overlong_penalty,
        ["reward.functions=[correct, overlong]"],
        "0 for every completion without a reward.overlong_buffer",
    ),
    (
        rules.some_reward_has_a_weight,
        ["reward.functions=[{function: correct, weight: 0}]"],
        "nothing would be learned",
    ),
    (rules.normalising_each_needs_a_list, ["reward.combine=normalise_each"], "needs reward.functions"),
    (
        rules.normalising_each_is_by_group,
        ["reward.combine=normalise_each", "reward.functions=[correct, boxed]", "method.scale=batch"],
        "leave method.scale at group",
    ),
    (
        rules.truncated_sampling_needs_its_weight,
        ["rollout.top_p=0.9"],
        "needs method.importance=truncated: .* without that weight the gradient is biased",
    ),
    (
        rules.truncated_sampling_needs_its_weight,
        ["rollout.top_k=20"],
        "a rollout.top_k needs method.importance=truncated",
    ),
    (
        rules.truncated_sampling_needs_its_weight,
        ["rollout.min_p=0.05"],
        "rollout.min_p above 0 needs method.importance=truncated",
    ),
    (
        rules.a_limit_of_tokens_needs_a_constant_schedule,
        ["training={iterations: 1, max_tokens: 9, schedule: cosine}"],
        "must be constant with training.max_tokens",
    ),
    (
        rules.an_order_needs_pass_rates,
        ["data.curriculum=easy_first"],
        "easy_first needs data.pass_rate.file, the pass rates that it orders prompts by",
    ),
]
"""Rules of RULES, the overrides that break each of them, and words of its sentence."""

DOUBTS = [
    (rules.offload_needs_checkpointing, ["model.activation_offload=true"], "without it, weights would be moved too"),
    (
        rules.token_budget_needs_dynamic_sampling,
        ["rollout.token_budget=5"],
        "no effect without rollout.dynamic_sampling",
    ),
    (
        rules.unpacked_base_needs_a_packed_one,
        ["rollout.unpacked_base=always", "model.quantization=none"],
        "no effect with model.quantization=none",
    ),
    (rules.none_is_a_word, ["data.system_prompt=none"], "data.system_prompt is the word 'none': write null"),
    (
        rules.a_preset_brings_its_pieces,
        [f"method={yaml.safe_dump(vars(PRESETS['hapo']), default_flow_style=True, width=9999)}", "method.preset=dapo"],
        "every piece is that of hapo: write method=dapo",
    ),
    (rules.one_update_disables_hapo, ["training.updates_per_iteration=1"], "every ratio is 1"),
    (
        rules.one_update_disables_eps_uncertain,
        ["method=archer", "training.updates_per_iteration=1"],
        "eps_uncertain does nothing",
    ),
    (
        rules.one_update_makes_all_surrogates_one,
        ["method=gspo", "training.updates_per_iteration=1"],
        "method.surrogate makes no difference",
    ),
    (rules.a_soft_gate_has_no_bounds, ["method=sapo", "method.adaptive_clip=true"], "sapo has no bounds"),
    (rules.low_side_needs_a_reader, ["method=dapo", "method.low_side=positive"], "low_side has no effect"),
    (
        rules.redistribution_needs_certain_tokens,
        ["method=hapo", "method.trained_tokens=uncertain"],
        "all that redistribution can suppress",
    ),
    (
        rules.uncertain_among_needs_a_reader,
        ["method=grpo", "method.uncertain_among=completion"],
        "uncertain_among has no effect",
    ),
    (
        rules.hapo_with_overlong_penalty,
        ["method=hapo_public_code", "reward.overlong_buffer=8"],
        "sensitive to the overlong penalty",
    ),
    (
        rules.grpo_with_overlong_penalty,
        ["method=grpo", "reward.overlong_buffer=8"],
        "GRPO as published has no length penalty",
    ),
]
"""Rules of ADVICE, the overrides that bring each of them, and words of its sentence."""


def rule_names(cases):
    return [rule.__name__ for rule, *_ in cases]


@pytest.mark.parametrize(("rule", "overrides", "words"), ERRORS, ids=rule_names(ERRORS))
def test_a_broken_rule_is_an_error_of_one_sentence(write_recipe, monkeypatch, rule, overrides, words):
    path = write_recipe(MINIMAL)
    with pytest.raises(UserError, match=words) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(schema, "RULES", ())
    recipe = load_recipe(path, overrides)
    assert [broken for broken in rules.RULES if broken(recipe)] == [rule]
    assert str(error.value) == f"{path}: {rule(recipe)}"


@pytest.mark.parametrize(("rule", "overrides", "words"), DOUBTS, ids=rule_names(DOUBTS))
def test_settings_that_are_seldom_meant_get_a_sentence(write_recipe, rule, overrides, words):
    recipe = load_recipe(write_recipe(MINIMAL), overrides)
    [note] = recipe.advice()
    assert words in note
    assert note == rule(recipe)


def test_every_rule_has_a_reason_and_a_case():
    in_module = {f for name, f in inspect.getmembers(rules, inspect.isfunction) if f.__module__ == rules.__name__}
    assert in_module == {*rules.RULES, *rules.ADVICE}
    assert len(in_module) == len(rules.RULES) + len(rules.ADVICE)
    assert {rule for rule, *_ in ERRORS} == set(rules.RULES)
    assert {rule for rule, *_ in DOUBTS} == set(rules.ADVICE)
    for rule in in_module:
        sentences = " ".join((rule.__doc__ or "").split()).split(". ")
        assert 1 <= len(sentences) <= 2 and sentences[-1].endswith("."), (
            f"{rule.__name__}: say why, in a sentence or two"
        )


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_needs_advice(write_recipe, name):
    assert not load_recipe(write_recipe(MINIMAL), [f"method={name}"]).advice()


def test_every_preset_has_a_row_in_the_docs():
    rows = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"| `{name}` |" not in rows] == []


def test_help_lists_every_field_with_a_meaning():
    listed = {line.strip().split(" ")[0]: line.partition("): ")[2] for line in describe_fields().splitlines()[1:]}

    def leaves(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    fields = set(leaves(yaml.safe_load(Recipe.model_validate(MINIMAL | {"name": "x"}).to_yaml())))
    assert fields - {"evaluation.data", "data.pass_rate"} <= set(listed)
    assert all(listed.values())


def test_what_makes_another_run_of_a_recipe(write_recipe):
    unread = ["training.iterations=9", "checkpoint.keep=5", "reward.workers=1", "output_dir=there"]
    now = load_recipe(write_recipe(MINIMAL), unread)
    before = load_recipe(write_recipe(MINIMAL)).model_dump(mode="json")
    assert first_incompatible_setting(before, now) is None
    del before["training"]["weight_decay"]  # as of a version that had no such setting
    assert first_incompatible_setting(before, now) is None
    before["rollout"]["temperature"] = 0.5
    assert first_incompatible_setting(before, now) == "rollout.temperature = 0.5, the recipe now says 1.0"
    before["rollout"]["of_the_future"] = 1
    assert "rollout.of_the_future is not a field" in first_incompatible_setting(before, now)
    assert "other settings" in first_incompatible_setting(None, now)
