"""The worked solutions that a warm start learns from: those that fit, and their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hapo_lite.errors import UserError, counted
from hapo_lite.model.policy import Policy
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.runs.progress import Progress
from hapo_lite.sft.recipe import WarmRecipe
from hapo_lite.tasks.data import split_held_out
from hapo_lite.tasks.store import Selection
from hapo_lite.tasks.stream import LazyPrompts
from hapo_lite.train.prompts import Say


@dataclass(frozen=True)
class Solution:
    """A prompt and the tokens of its worked solution, [T], with the token that ends the turn. On the CPU."""

    prompt: EncodedPrompt
    ids: Tensor

    @property
    def length(self) -> int:
        """The number of tokens of the solution."""
        return self.ids.shape[0]


class Encoder:
    """Turns prompts into solutions, with the tokens that the sampler would have to write."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.end = policy.end_of_turn

    def solution(self, prompt: EncodedPrompt) -> Solution:
        """The worked solution of an encoded prompt."""
        return Solution(prompt, torch.tensor(self.policy.encode_answer(prompt.prompt.solution, self.end)))

    def encoded(self, index: int, prompt: Prompt) -> Solution:
        """The worked solution of a prompt. index: as in `EncodedPrompt`."""
        return self.solution(EncodedPrompt(index, prompt, tuple(self.policy.encode(prompt.chat()))))


class WorkedPrompts(LazyPrompts):
    """Prompts whose worked solutions are trained on. kept: solutions that are kept aside, for the loss on them."""

    def __init__(self, prompts: Sequence[Prompt], policy: Policy, most: int, kept: Sequence[Solution]) -> None:
        super().__init__(prompts, lambda prompt: policy.encode(prompt.chat()), most)
        self.kept = kept


def worked_prompts(
    prompts: Sequence[Prompt], policy: Policy, recipe: WarmRecipe, progress: Progress, say: Say
) -> WorkedPrompts:
    """The prompts with a worked solution that fits, of which a share is kept aside. Every one is tokenised now.

    Raises UserError if no solution fits, or if none would be left to train on.
    """
    encoder = Encoder(policy)
    fitting = fit(prompts, encoder, recipe, progress, say)
    count = round(recipe.sft.held_out * len(fitting)) or int(recipe.sft.held_out > 0)
    if count >= len(fitting):
        raise UserError(
            f"sft.held_out = {recipe.sft.held_out:g} of {len(fitting)} worked solutions leaves none to train on: lower "
            "it, or set it to 0"
        )
    kept: Sequence[Prompt] = ()
    rest: Sequence[Prompt] = fitting
    if count:
        rest, kept = split_held_out(fitting, count, recipe.seed)
    solutions = [encoder.encoded(index, prompt) for index, prompt in enumerate(kept)]
    return WorkedPrompts(rest, policy, recipe.data.max_prompt_tokens, solutions)


class _Lengths(NamedTuple):
    """Tokens of a prompt and of its solution."""

    prompt: int
    solution: int


def fit(prompts: Sequence[Prompt], encoder: Encoder, recipe: WarmRecipe, progress: Progress, say: Say) -> Selection:
    """The prompts whose worked solution can be trained on. How many were left out, and why, is said.

    Raises UserError if there are none.
    """
    progress.count(len(prompts), "solutions")
    left_out: Counter[str] = Counter()
    places: list[int] = []
    shortest: _Lengths | None = None
    for place, prompt in enumerate(prompts):
        progress.advance(1)
        if not prompt.solution:
            left_out["no worked solution"] += 1
            continue
        solution = encoder.encoded(place, prompt)
        lengths = _Lengths(len(solution.prompt.ids), solution.length)
        if problem := _too_long(lengths, recipe, encoder.policy.context):
            left_out[problem] += 1
            shortest = min(shortest or lengths, lengths, key=sum)
        else:
            places.append(place)
    if not places:
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        least = f"; the shortest has {shortest.prompt} + {shortest.solution} tokens" if shortest else ""
        raise UserError(
            f"no worked solution of {recipe.data.source} can be trained on ({reasons}{least}): raise "
            "sft.max_solution_tokens or data.max_prompt_tokens, or set data.solution_column"
        )
    for reason, count in left_out.items():
        say(f"data: {counted(count, 'prompt')} left out: {reason}")
    return Selection(prompts, places)


def _too_long(lengths: _Lengths, recipe: WarmRecipe, context: int) -> str | None:
    """Why a prompt and its solution are too long, as a clause; None if they are not."""
    if lengths.prompt > recipe.data.max_prompt_tokens:
        return f"prompt longer than data.max_prompt_tokens = {recipe.data.max_prompt_tokens}"
    if lengths.solution > recipe.max_solution_tokens:
        setting = "sft.max_solution_tokens" if recipe.sft.max_solution_tokens else "rollout.max_new_tokens"
        return f"solution longer than {setting} = {recipe.max_solution_tokens} tokens"
    if lengths.prompt + lengths.solution > context:
        return f"prompt and solution longer than the model's context of {context}"
    return None
