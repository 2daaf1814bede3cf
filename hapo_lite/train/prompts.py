"""From the recipe's data to tokenised prompts, trained on and held out."""

from __future__ import annotations

from collections.abc import Sequence

from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import DataSettings, Recipe
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.tasks.data import PromptSet, load_prompts, split_held_out
from hapo_lite.tasks.stream import LazyPrompts

LOOKED_AT = 1_000
"""About how many training prompts are tokenised at the start, to see whether they fit."""


def load_data(recipe: Recipe, say) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Training prompts and held-out prompts, disjoint."""
    wanted = recipe.evaluation.prompts
    found = load_prompts(recipe.data)
    say_skipped("data", found, say)
    own = recipe.evaluation.data
    if own is None and recipe.data.source == "tiny":
        own = recipe.data.model_copy(update={"split": "test", "limit": None})
    if wanted == 0:
        return found.prompts, ()
    if own is None:
        return split_held_out(found.prompts, wanted, recipe.seed)
    held_out = load_prompts(own)
    say_skipped("held-out data", held_out, say)
    return found.prompts, held_out.prompts[:wanted]


def say_skipped(what: str, found: PromptSet, say) -> None:
    for reason, count in found.skipped.items():
        say(f"{what}: {count:,} rows left out: {reason}")


def training_prompts(
    prompts: Sequence[Prompt], policy: Policy, data: DataSettings, max_new_tokens: int, say
) -> LazyPrompts:
    """Prompts to be tokenised as training takes them. Some, from all over the data, are looked at now.

    Raises UserError for what is wrong with those.
    """
    some = prompts[:: max(1, len(prompts) // LOOKED_AT)]
    encode_prompts(some, policy, data, max_new_tokens, say, of=len(prompts))
    most = min(data.max_prompt_tokens, policy.context - max_new_tokens)
    return LazyPrompts(prompts, lambda prompt: policy.encode(prompt.chat()), most)


def encode_prompts(
    prompts: Sequence[Prompt], policy: Policy, data: DataSettings, max_new_tokens: int, say, of: int | None = None
) -> list[EncodedPrompt]:
    """Tokenise, and leave out what exceeds data.max_prompt_tokens. Raises UserError if a completion would not fit.

    of: how many prompts these stand for, for the sentence about those that are left out.
    """
    encoded = [EncodedPrompt(i, p, tuple(policy.encode(p.chat()))) for i, p in enumerate(prompts)]
    kept = [e for e in encoded if len(e.ids) <= data.max_prompt_tokens]
    if encoded and not kept:
        shortest = min(len(e.ids) for e in encoded)
        raise UserError(
            f"every prompt is longer than data.max_prompt_tokens = {data.max_prompt_tokens}: "
            f"the shortest has {shortest} tokens"
        )
    if len(kept) < len(encoded):
        count, limit = len(encoded) - len(kept), data.max_prompt_tokens
        if of is not None and of > len(encoded):
            say(
                f"data: {count} of {len(encoded):,} prompts looked at, longer than {limit} tokens; such are passed over"
            )
        else:
            say(f"data: {count} prompts left out: longer than {limit} tokens")
    longest = max(kept, key=lambda e: len(e.ids), default=None)
    if longest is not None and len(longest.ids) + max_new_tokens > policy.context:
        raise UserError(
            f"prompt {longest.prompt.id} has {len(longest.ids)} tokens, which with rollout.max_new_tokens = "
            f"{max_new_tokens} exceeds the model's context of {policy.context}: lower data.max_prompt_tokens or "
            "rollout.max_new_tokens"
        )
    return kept
