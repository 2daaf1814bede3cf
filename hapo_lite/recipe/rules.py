"""The rules between fields of a recipe, one function each, with the reason for the rule as its docstring.

A rule returns a sentence if the recipe breaks it, else None. `RULES` make a recipe invalid. `ADVICE` is about settings
that are allowed but seldom meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.recipe.curriculum import TrainingDataSettings
from hapo_lite.recipe.sections import (
    EvaluationSettings,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    TrainingSettings,
)


class Sections(Protocol):
    """What the rules read of a recipe, which is frozen."""

    @property
    def model(self) -> ModelSettings: ...
    @property
    def data(self) -> TrainingDataSettings: ...
    @property
    def reward(self) -> RewardSettings: ...
    @property
    def rollout(self) -> RolloutSettings: ...
    @property
    def method(self) -> Method: ...
    @property
    def training(self) -> TrainingSettings: ...
    @property
    def evaluation(self) -> EvaluationSettings: ...


def offload_needs_checkpointing(recipe: Sections) -> str | None:
    """Checkpointing leaves one input per layer to move. Without checkpointing the saved tensors include weights."""
    if recipe.model.activation_offload and not recipe.model.gradient_checkpointing:
        return (
            "model.activation_offload does nothing, since it needs model.gradient_checkpointing: without it, weights "
            "would be moved too."
        )
    return None


def dora_is_sampled_by_the_policys_own_model(recipe: Sections) -> str | None:
    """vLLM refuses DoRA adapters, and Unsloth's inference adds the two products without the magnitudes."""
    engine = recipe.rollout.engine
    if recipe.model.lora.variant == "dora" and engine in ("vllm", "unsloth"):
        return (
            f"model.lora.variant=dora cannot be sampled by rollout.engine={engine}, which has no DoRA: use "
            "rollout.engine=transformers or paged, or model.lora.variant=rslora"
        )
    return None


def groups_have_two_completions(recipe: Sections) -> str | None:
    """An advantage compares a completion with the others of its group."""
    if recipe.rollout.completions_per_prompt < 2:
        return "rollout.completions_per_prompt must be at least 2: a group of one has no advantage to compute"
    return None


def overlong_ramp_starts_after_the_first_token(recipe: Sections) -> str | None:
    """The penalty is a ramp over the last tokens before the limit. A ramp as long as the limit penalises everything."""
    if recipe.reward.overlong_buffer >= recipe.rollout.max_new_tokens:
        return "reward.overlong_buffer must be smaller than rollout.max_new_tokens: else every completion is overlong"
    return None


def every_update_has_a_completion(recipe: Sections) -> str | None:
    """The updates of an iteration share its completions, and an update without a completion has no gradient."""
    completions = recipe.rollout.prompts_per_iteration * recipe.rollout.completions_per_prompt
    if recipe.training.updates_per_iteration > completions:
        return (
            "training.updates_per_iteration exceeds the completions of an iteration (rollout.prompts_per_iteration x "
            f"rollout.completions_per_prompt): some updates would be empty; set it to {completions} or less"
        )
    return None


def a_correct_answer_earns_more(recipe: Sections) -> str | None:
    """Training raises the probability of the completions with the higher reward. A reward function of your own does
    not read these two fields."""
    reward = recipe.reward
    if reward.functions:
        graded = any(named.function == "correct" for named in reward.functions)
    else:
        graded = reward.function is None
    if graded and reward.correct <= reward.wrong:
        return "reward.correct must exceed reward.wrong: otherwise wrong answers are what is learned"
    return None


def one_reward_or_a_list(recipe: Sections) -> str | None:
    """The list replaces every other reward, so a function beside the list would never be called."""
    if recipe.reward.function is not None and recipe.reward.functions:
        return "reward.function and reward.functions are both set: put the one function into the list too"
    return None


def a_list_names_the_overlong_penalty(recipe: Sections) -> str | None:
    """The list replaces every other reward, so the penalty counts only where the list has it. Its ramp stays a setting
    of its own."""
    reward = recipe.reward
    named = any(listed.function == "overlong" for listed in reward.functions)
    if reward.functions and reward.overlong_buffer and not named:
        return "reward.overlong_buffer has no effect on reward.functions: add `overlong` to the list, or set it to 0"
    if named and not reward.overlong_buffer:
        return "reward.functions has `overlong`, which is 0 for every completion without a reward.overlong_buffer"
    return None


def some_reward_has_a_weight(recipe: Sections) -> str | None:
    """Rewards of weight 0 are measured and teach nothing."""
    if recipe.reward.functions and not any(named.weight for named in recipe.reward.functions):
        return "reward.functions has the weight 0 for every reward: nothing would be learned"
    return None


def normalising_each_needs_a_list(recipe: Sections) -> str | None:
    """A single reward has nothing to be balanced against."""
    if recipe.reward.combine == "normalise_each" and not recipe.reward.functions:
        return "reward.combine=normalise_each needs reward.functions, the rewards that it normalises"
    return None


def normalising_each_is_by_group(recipe: Sections) -> str | None:
    """The method divides each reward by the standard deviation of its group, and the sum by that of the iteration."""
    if recipe.reward.functions and recipe.reward.combine == "normalise_each" and recipe.method.scale != "group":
        return "reward.combine=normalise_each divides each reward by its group's spread: leave method.scale at group"
    return None


def token_budget_needs_dynamic_sampling(recipe: Sections) -> str | None:
    """Only dynamic sampling draws more groups than it was asked for, so only dynamic sampling has a budget to keep."""
    if recipe.rollout.token_budget is not None and not recipe.rollout.dynamic_sampling:
        return "rollout.token_budget has no effect without rollout.dynamic_sampling."
    return None


def truncated_sampling_needs_its_weight(recipe: Sections) -> str | None:
    """Truncated sampling draws a token that it keeps 1 / mass times as often as the policy does, where mass is the
    probability of all kept tokens. The weight takes that factor back; no weight brings back what is never drawn."""
    rollout = recipe.rollout
    setting = way_out = ""
    if rollout.top_p < 1.0 or rollout.top_k is not None:
        setting, way_out = "rollout.top_p below 1 or a rollout.top_k", "rollout.top_p=1 and rollout.top_k=null sample"
    elif rollout.min_p > 0.0:
        setting, way_out = "rollout.min_p above 0", "rollout.min_p=0 samples"
    if setting and recipe.method.importance != "truncated":
        return (
            f"{setting} needs method.importance=truncated: tokens are then drawn from another distribution than the "
            f"policy's, and without that weight the gradient is biased; {way_out} from the policy itself"
        )
    return None


def a_limit_of_tokens_needs_a_constant_schedule(recipe: Sections) -> str | None:
    """A schedule falls to its end over a known number of updates. A run that ends by tokens has no such number."""
    if recipe.training.max_tokens is not None and recipe.training.schedule != "constant":
        return (
            "training.schedule must be constant with training.max_tokens: a run that ends by tokens does not know "
            "how many updates a schedule has to fill"
        )
    return None


def unpacked_base_needs_a_packed_one(recipe: Sections) -> str | None:
    """Only a 4-bit base is packed."""
    if recipe.rollout.unpacked_base == "always" and recipe.model.quantization == "none":
        return "rollout.unpacked_base has no effect with model.quantization=none."
    return None


def an_order_needs_pass_rates(recipe: Sections) -> str | None:
    """Prompts can be put in order only by pass rates that are known before the run."""
    if recipe.data.curriculum == "easy_first" and recipe.data.pass_rate is None:
        return (
            "data.curriculum=easy_first needs data.pass_rate.file, the pass rates that it orders prompts by: python -m "
            "hapo_lite.probe measures them"
        )
    return None


def none_is_a_word(recipe: Sections) -> str | None:
    """YAML writes nothing as null. Every other word is a text, which the model would read as its system message."""
    for name, data in {"data": recipe.data, "evaluation.data": recipe.evaluation.data}.items():
        prompt = data.system_prompt if data is not None else None
        if prompt is not None and prompt.strip().lower() in ("none", "null", "off", "never", "false", "no"):
            return f"{name}.system_prompt is the word {prompt!r}: write null for no system message."
    return None


def a_preset_brings_its_pieces(recipe: Sections) -> str | None:
    """A recorded recipe has every piece written out, so that another name for the preset changes none of them."""
    method = recipe.method
    for name, preset in PRESETS.items():
        if name != method.preset and method == replace(preset, preset=method.preset):
            return (
                f"method.preset is {method.preset}, and every piece is that of {name}: write method={method.preset} "
                "for the pieces of that preset."
            )
    return None


def one_update_disables_hapo(recipe: Sections) -> str | None:
    """Redistribution and adaptive clipping act on the ratio to the old policy, which the first update leaves at 1."""
    method = recipe.method
    if recipe.training.updates_per_iteration == 1 and (method.redistribution or method.adaptive_clip):
        return (
            "training.updates_per_iteration is 1, so every ratio is 1: redistribution can only suppress and "
            "adaptive clipping does nothing. Use 4 or more for HAPO."
        )
    return None


def one_update_disables_eps_uncertain(recipe: Sections) -> str | None:
    """Bounds on the ratio to the old policy stop nothing in the first update, where every ratio is 1."""
    if recipe.training.updates_per_iteration == 1 and recipe.method.eps_uncertain is not None:
        return "training.updates_per_iteration is 1, so every ratio is 1: method.eps_uncertain does nothing."
    return None


def one_update_makes_all_surrogates_one(recipe: Sections) -> str | None:
    """Surrogates differ in how they treat a token that has moved. At ratio 1 all of them have the same gradient."""
    if recipe.training.updates_per_iteration == 1 and recipe.method.surrogate != "clip":
        return "training.updates_per_iteration is 1, so every ratio is 1: method.surrogate makes no difference."
    return None


def a_soft_gate_has_no_bounds(recipe: Sections) -> str | None:
    """SAPO's gate takes the place of the bounds, so what widens them by entropy has nothing to act on."""
    method = recipe.method
    if method.surrogate == "sapo" and (method.adaptive_clip or method.eps_uncertain is not None):
        return "method.surrogate=sapo has no bounds: method.adaptive_clip and method.eps_uncertain have no effect."
    return None


def low_side_needs_a_reader(recipe: Sections) -> str | None:
    """The setting decides the sign of h below the pivot, and only three pieces of the method read h."""
    method = recipe.method
    reads_h = method.adaptive_temperature or method.redistribution or method.adaptive_clip
    if method.low_side == "positive" and not reads_h:
        return "method.low_side has no effect without adaptive_temperature, redistribution or adaptive_clip."
    return None


def redistribution_needs_certain_tokens(recipe: Sections) -> str | None:
    """Redistribution suppresses certain tokens only. If they are not trained, it has nothing to suppress."""
    if recipe.method.trained_tokens == "uncertain" and recipe.method.redistribution:
        return "method.trained_tokens leaves out the certain tokens, which are all that redistribution can suppress."
    return None


def uncertain_among_needs_a_reader(recipe: Sections) -> str | None:
    """The setting decides which tokens are uncertain, and only three pieces of the method ask for that."""
    method = recipe.method
    reads_it = method.trained_tokens == "uncertain" or method.eps_uncertain is not None or method.needs_base
    if method.uncertain_among == "completion" and not reads_it:
        return "method.uncertain_among has no effect without trained_tokens, eps_uncertain or a divergence."
    return None


def hapo_with_overlong_penalty(recipe: Sections) -> str | None:
    """The authors of HAPO report that the method is sensitive to the overlong penalty."""
    if recipe.method.preset.startswith("hapo") and recipe.reward.overlong_buffer:
        return "HAPO's authors warn that it is sensitive to the overlong penalty (reward.overlong_buffer)."
    return None


def grpo_with_overlong_penalty(recipe: Sections) -> str | None:
    """The overlong penalty came with DAPO, so a run with it is not the GRPO that was published."""
    if recipe.method.preset == "grpo" and recipe.reward.overlong_buffer:
        return "reward.overlong_buffer is DAPO's; GRPO as published has no length penalty."
    return None


Rule = Callable[[Sections], str | None]

RULES: tuple[Rule, ...] = (
    dora_is_sampled_by_the_policys_own_model,
    groups_have_two_completions,
    overlong_ramp_starts_after_the_first_token,
    every_update_has_a_completion,
    a_correct_answer_earns_more,
    one_reward_or_a_list,
    a_list_names_the_overlong_penalty,
    some_reward_has_a_weight,
    normalising_each_needs_a_list,
    normalising_each_is_by_group,
    truncated_sampling_needs_its_weight,
    a_limit_of_tokens_needs_a_constant_schedule,
    an_order_needs_pass_rates,
)
"""The rules that every recipe keeps. A recipe that breaks several is refused with the sentence of the first."""

ADVICE: tuple[Rule, ...] = (
    offload_needs_checkpointing,
    token_budget_needs_dynamic_sampling,
    unpacked_base_needs_a_packed_one,
    none_is_a_word,
    a_preset_brings_its_pieces,
    one_update_disables_hapo,
    one_update_disables_eps_uncertain,
    one_update_makes_all_surrogates_one,
    a_soft_gate_has_no_bounds,
    low_side_needs_a_reader,
    redistribution_needs_certain_tokens,
    uncertain_among_needs_a_reader,
    hapo_with_overlong_penalty,
    grpo_with_overlong_penalty,
)
"""What the settings of a valid recipe may make useless or doubtful. All sentences are shown."""
