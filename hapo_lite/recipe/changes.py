"""Which settings a run may change when it is resumed, and which setting makes a recipe that of another run."""

from __future__ import annotations

from typing import Any

from hapo_lite.errors import UserError
from hapo_lite.recipe.load import parse_recipe
from hapo_lite.recipe.schema import Recipe

READ_BY_ONE = {
    "train": (
        "method",
        "rollout.prompts_per_iteration",
        "rollout.completions_per_prompt",
        "rollout.temperature",
        "rollout.top_p",
        "rollout.top_k",
        "rollout.min_p",
        "rollout.old_logprobs",
        "rollout.dynamic_sampling",
        "rollout.token_budget",
        "training.updates_per_iteration",
        "training.learning_rate",
        "training.schedule",
        "training.warmup_updates",
        "data.pass_rate",
        "data.curriculum",
        "data.rest",
    ),
    "sft": ("sft", "data.solution_column"),
}
"""Sections and fields that one command alone reads. A run of another command may have changed them."""
MAY_CHANGE = (
    "output_dir",
    "model.revision",
    "data.revision",
    "data.pass_rate.file",
    "training.iterations",
    "training.max_tokens",
    "training.max_skipped",
    "training.micro_batch_tokens",
    "rollout.batch_size",
    "rollout.engine_memory",
    "rollout.unpacked_base",
    "rollout.cuda_graphs",
    "reward.workers",
    "model.gradient_checkpointing",
    "model.activation_offload",
    "checkpoint",
    "logging",
    "evaluation.every",
    "benchmark",
)
"""Sections and fields that a resumed run may have changed and still be the same run.

The revisions are among them because a checkpoint records the commits that they stood for, and the file of pass rates
because it records a digest of the prompts and rates.
"""


def first_incompatible_setting(before: dict[str, Any], now: Recipe) -> str | None:
    """The first setting in which `now` cannot continue the run of `before`, as a clause; None: it can.

    before: the run's recipe as a mapping. A setting that `before` lacks, because an older version wrote it, counts as
    its default.
    """
    try:
        then = flatten(parse_recipe(before).model_dump(mode="json"))
    except UserError as error:
        return f"other settings than this version has ({error})"
    settings = flatten(now.model_dump(mode="json"))
    unread = [key for command, keys in READ_BY_ONE.items() if command != now.command for key in keys]
    # An option of the chat template is a key on one side alone where it was added or taken away.
    for key in {**settings, **then}:
        old, value = then.get(key), settings.get(key)
        if key == "model.chat_template_date" and None in (old, value):
            continue  # Whoever names no date takes that of the run.
        if old != value and not key.startswith((*MAY_CHANGE, *unread)):
            return f"{key} = {old}, the recipe now says {value}"
    return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists become text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
    return flat
