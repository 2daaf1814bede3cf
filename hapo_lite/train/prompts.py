"""Reading and tokenising the recipe's prompts, those to train on and the held-out ones."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from hapo_lite.errors import UserError, counted
from hapo_lite.model.policy import Policy
from hapo_lite.model.template import text_of
from hapo_lite.recipe import DataSettings, EvaluationSettings, PassRateSettings, Recipe
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.tasks.data import Column, PromptSet, load_prompts, split_held_out, without_problems
from hapo_lite.tasks.pass_rates import PassRates, choose_by_pass_rate
from hapo_lite.tasks.stream import LazyPrompts
from hapo_lite.tiny.bundled import TASKS

Say = Callable[[str], None]
"""Prints a sentence for the user."""

LONGEST_SHOWN = 2_000
"""Most characters of the first prompt that are printed."""
CHECKED_AT_START = 1_000
"""Roughly the number of training prompts that are tokenised at the start, to see whether they fit."""


class Data(NamedTuple):
    """Prompts to train on and prompts to evaluate on, disjoint. rates: pass rates that were measured before the run."""

    training: Sequence[Prompt]
    held_out: Sequence[Prompt]
    rates: PassRates = MappingProxyType({})

    def chosen(self, settings: PassRateSettings | None, say: Say) -> Data:
        """The data with the prompts to train on that `data.pass_rate` chooses. Raises as `choose_by_pass_rate` does."""
        if settings is None:
            return self
        chosen = choose_by_pass_rate(self.training, settings, say)
        return self._replace(training=chosen.prompts, rates=chosen.rates)


def load_data(
    data: DataSettings,
    evaluation: EvaluationSettings,
    seed: int,
    say: Say,
    columns: Sequence[Column] = (),
    solutions: bool = False,
    before: Recipe | None = None,
) -> Data:
    """Read the prompts. seed: decides which prompts are held out if `evaluation` names no data of its own.

    columns: those that rewards ask for, of the data to train on. solutions: read the worked solutions of the training
    prompts too. The prompts are the same ones either way. before: the recipe of the run whose adapter this one goes on
    from; a note says how many of the held-out prompts that run was trained on, where it read the same data. Raises
    UserError as `load_prompts` does, and if nothing is left to train on.
    """
    wanted = evaluation.prompts
    found = load_prompts(data, columns, solutions)
    say_skipped("data", found, say)
    own = evaluation.data
    if own is None and data.source in TASKS:
        own = data.model_copy(update={"split": "test", "limit": None})
    if wanted == 0:
        return Data(found.prompts, ())
    if own is None:
        split = Data(*split_held_out(found.prompts, wanted, seed))
        say_trained_before(split.held_out, found.prompts, data, before, say)
        return split
    loaded = load_prompts(own)
    say_skipped("held-out data", loaded, say)
    held_out = loaded.prompts[:wanted]
    training = without_problems(found.prompts, held_out)
    if not training:
        raise UserError(
            f"evaluation.prompts = {wanted} hold out every problem of data.source = {data.source}: lower it, or leave "
            "evaluation.data out"
        )
    if len(training) < len(found.prompts):
        missing = len(found.prompts) - len(training)
        say(f"data: {counted(missing, 'problem')} of the evaluation {'is' if missing == 1 else 'are'} not trained on")
    return Data(training, held_out)


def say_trained_before(
    held_out: Sequence[Prompt], prompts: Sequence[Prompt], data: DataSettings, before: Recipe | None, say: Say
) -> None:
    """Say how many held-out prompts an earlier run was trained on. prompts: all of the data, of which they are some.

    before: the recipe of that run; nothing is said of one that read other data.
    """
    if before is None or _rows(before.data) != _rows(data):
        return
    spared: Sequence[Prompt] = ()
    if before.evaluation.data is None and 0 < before.evaluation.prompts < len(prompts):
        spared = split_held_out(prompts, before.evaluation.prompts, before.seed)[1]
    seen = len(without_problems(held_out, spared))
    if seen:
        say(
            f"note: {seen:,} of {counted(len(held_out), 'held-out prompt')} were trained on by the run that "
            "model.adapter goes on from: give that run the same seed and evaluation.prompts, or set evaluation.data"
        )


def _rows(data: DataSettings) -> dict[str, Any]:
    """The settings that decide which rows of which data are read."""
    return data.model_dump(include={"source", "config", "split", "limit", "problem_column", "answer_column"})


def say_skipped(what: str, found: PromptSet, say: Say) -> None:
    """Say how many rows were left out for each reason, and which one was the first. what: names the data."""
    for sentence in found.left_out():
        say(f"{what}: {sentence}")


def training_prompts(
    prompts: Sequence[Prompt], policy: Policy, data: DataSettings, max_new_tokens: int, say: Say
) -> LazyPrompts:
    """Prompts that are tokenised as training takes them. A sample of them is tokenised and checked now.

    Raises UserError as `encode_prompts` does, for the sample.
    """
    sample = prompts[:: max(1, len(prompts) // CHECKED_AT_START)]
    encode_prompts(sample, policy, data, max_new_tokens, say, total=len(prompts))
    limit = min(data.max_prompt_tokens, policy.context - max_new_tokens)
    return LazyPrompts(prompts, lambda prompt: policy.encode(prompt.chat()), limit)


def first_prompt(prompts: Iterable[EncodedPrompt | None], policy: Policy) -> Iterator[str]:
    """The first prompt as the model reads it, special tokens included, and a note for what is lost on the way there.

    Most surprises of a chat template can be seen in it: a date, a system message, an open <think>.
    """
    first = next((prompt for prompt in prompts if prompt is not None), None)
    if first is None:
        return
    text = text_of(policy.tokenizer, first.ids, hidden=())
    tokens = counted(len(first.ids), "token")
    yield f"first prompt, {tokens}:\n{textwrap.indent(shown(text), '  | ', lambda line: True)}"
    for role, content in first.prompt.messages:
        if role == "system" and content.strip() and content.strip() not in text:
            yield (
                "note: the chat template leaves the system message out: put what it says into the problems, or set "
                "data.system_prompt=null"
            )


def shown(text: str) -> str:
    """A text for the terminal: its middle left out where it is long, and control characters written as escapes."""
    if len(text) > LONGEST_SHOWN:
        half = LONGEST_SHOWN // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def encode_prompts(
    prompts: Sequence[Prompt],
    policy: Policy,
    data: DataSettings,
    max_new_tokens: int,
    say: Say,
    total: int | None = None,
) -> list[EncodedPrompt]:
    """Tokenise `prompts`, and leave out those longer than data.max_prompt_tokens.

    total: number of all prompts, if these are a sample of them. Raises UserError if every prompt is too long, or if a
    prompt leaves no room for a completion in the model's context.
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
        if total is not None and total > len(encoded):
            say(
                f"data: {count:,} of {counted(len(encoded), 'prompt')} checked {'is' if count == 1 else 'are'} longer "
                f"than {counted(limit, 'token')}; training skips such prompts"
            )
        else:
            say(f"data: {counted(count, 'prompt')} left out: longer than {counted(limit, 'token')}")
    longest = max(kept, key=lambda e: len(e.ids), default=None)
    if longest is not None and len(longest.ids) + max_new_tokens > policy.context:
        raise UserError(
            f"prompt {longest.prompt.id} has {len(longest.ids)} tokens, which with rollout.max_new_tokens = "
            f"{max_new_tokens} exceeds the model's context of {policy.context}: lower data.max_prompt_tokens or "
            "rollout.max_new_tokens"
        )
    return kept
