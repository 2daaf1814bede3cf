"""Rewards by name: the kit's own, and functions of users, called with the arguments that their signatures ask for."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from hapo_lite.errors import UserError, counted
from hapo_lite.recipe import NamedReward, RewardSettings
from hapo_lite.records import Prompt
from hapo_lite.tasks.data import ARGUMENTS, Column
from hapo_lite.tasks.deadline import THEIRS, Awaited, EventLoop, Overdue, call_within
from hapo_lite.tasks.own_code import describe_error, load_function
from hapo_lite.tasks.verify import Grade, marked_answer


@dataclass(frozen=True)
class Batch:
    """B completions to be rewarded. token_counts: their lengths in tokens. max_new_tokens: the longest possible one."""

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    token_counts: Sequence[int]
    truncated: Sequence[bool]
    grades: Sequence[Grade]
    iteration: int
    max_new_tokens: int

    def argument(self, name: str) -> Any:
        """A fresh value for the argument `name`: one of ARGUMENTS, or a column of the data."""
        if name == "iteration":
            return self.iteration
        if name == "prompts":
            return [question(prompt) for prompt in self.prompts]
        if name == "answers":
            return [prompt.answer for prompt in self.prompts]
        if name in ARGUMENTS:
            return list(getattr(self, name))
        return [prompt.columns.get(name) for prompt in self.prompts]


def soft_overlong_penalty(length: int, max_new_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's length penalty (arXiv 2503.14476, Eq. 13), in [-penalty, 0]; lengths in tokens.

    0 up to max_new_tokens - buffer, then falling linearly to -penalty at max_new_tokens. buffer 0: always 0.
    """
    over = length - (max_new_tokens - buffer)
    if buffer == 0 or over <= 0:
        return 0.0
    return -penalty * min(over / buffer, 1.0)


def correct(batch: Batch, settings: RewardSettings) -> list[float]:
    """`reward.correct` for an answer that equals the gold answer, else `reward.wrong`."""
    return [settings.correct if grade.correct else settings.wrong for grade in batch.grades]


def boxed(batch: Batch, settings: RewardSettings) -> list[float]:
    """1 for a completion that gives its answer in a box or a tag, right or wrong, else 0."""
    return [float(marked_answer(text) is not None) for text in batch.completions]


def length(batch: Batch, settings: RewardSettings) -> list[float]:
    """Minus the share of `rollout.max_new_tokens` that the completion takes, from 0 to -1."""
    return [-count / batch.max_new_tokens for count in batch.token_counts]


def overlong(batch: Batch, settings: RewardSettings) -> list[float]:
    """DAPO's soft overlong penalty, with `reward.overlong_buffer` and `reward.overlong_penalty`."""
    return [
        soft_overlong_penalty(count, batch.max_new_tokens, settings.overlong_buffer, settings.overlong_penalty)
        for count in batch.token_counts
    ]


OURS: dict[str, Callable[[Batch, RewardSettings], list[float]]] = {
    "correct": correct,
    "boxed": boxed,
    "length": length,
    "overlong": overlong,
}
"""The rewards that a recipe takes by their name alone; `recipe.OWN_REWARDS` lists the names."""


@dataclass(frozen=True)
class OwnReward:
    """A user's function and what its signature asks for.

    needed: arguments without a default. optional: arguments with one. open: whether it takes `**kwargs`.
    """

    settings: NamedReward
    function: Callable[..., Any]
    needed: list[str]
    optional: list[str]
    open: bool

    @classmethod
    def load(cls, settings: NamedReward, files: dict[str, ModuleType]) -> OwnReward:
        """Import the function and read its signature. files: as in `load_function`. Raises UserError."""
        function = load_function(settings.function, "reward.functions", files)
        label = label_of(settings)
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (ValueError, TypeError):
            raise UserError(f"{label} does not say which arguments it takes: wrap it in a function that does") from None
        by_place = [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY]
        if by_place:
            raise UserError(
                f"{label} takes {by_place[0]} by its place alone: arguments are passed by name, so drop the /"
            )
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return cls(
            settings,
            function,
            needed=[p.name for p in named if p.default is p.empty],
            optional=[p.name for p in named if p.default is not p.empty],
            open=any(p.kind == p.VAR_KEYWORD for p in parameters),
        )

    @property
    def columns(self) -> list[Column]:
        """The columns of the data that it asks for."""
        asked = dict.fromkeys(self.needed, True) | dict.fromkeys(self.optional, False)
        label = label_of(self.settings)
        return [Column(name, label, required) for name, required in asked.items() if name not in ARGUMENTS]

    @property
    def is_async(self) -> bool:
        """Whether it is a coroutine function, or an object that is called as one."""
        call = getattr(self.function, "__call__", None)  # noqa: B004 (which function a call runs, not whether one can)
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def call(self, batch: Batch) -> Any:
        """What it returns for a batch, as a list where it yields one reward after another."""
        return listed(self._call(batch))

    async def awaited(self, batch: Batch) -> Any:
        """The same of an async function."""
        return listed(await self._call(batch))

    def _call(self, batch: Batch) -> Any:
        there = {*ARGUMENTS, *batch.prompts[0].columns}
        wanted = [*self.needed, *(name for name in self.optional if name in there)]
        if self.open:
            wanted += [name for name in ARGUMENTS if name not in wanted]
        return self.function(**{name: batch.argument(name) for name in wanted})


@dataclass(frozen=True)
class NamedRewards:
    """All rewards of `reward.functions`. Close it, since async functions have a thread."""

    settings: RewardSettings
    own: dict[str, OwnReward]
    loop: EventLoop = field(default_factory=EventLoop)

    @classmethod
    def load(cls, settings: RewardSettings) -> NamedRewards:
        """Import the functions; a file that several of them are in runs once. Raises UserError."""
        files: dict[str, ModuleType] = {}
        theirs = [named for named in settings.functions if named.function not in OURS]
        return cls(settings, {named.name: OwnReward.load(named, files) for named in theirs})

    @property
    def columns(self) -> list[Column]:
        """The columns of the data that the functions ask for."""
        return [column for own in self.own.values() for column in own.columns]

    def of(self, batch: Batch) -> list[dict[str, float]]:
        """The rewards of each completion by name. Raises UserError that names the function that failed.

        Async functions are awaited together, then the others are called in turn, each with its own deadline.
        """
        if not batch.completions:
            return []
        returned = self._awaited(batch)
        for name, own in self.own.items():
            if name not in returned:
                returned[name] = _called(own, batch)
        rewards = {
            named.name: OURS[named.function](batch, self.settings)
            if named.function in OURS
            else as_rewards(returned[named.name], len(batch.completions), label_of(named))
            for named in self.settings.functions
        }
        return [{name: values[i] for name, values in rewards.items()} for i in range(len(batch.completions))]

    def total(self, rewards: dict[str, float]) -> float:
        """The weighted sum of one completion's rewards."""
        return sum((named.weight * rewards[named.name] for named in self.settings.functions), 0.0)

    def close(self) -> None:
        """End the event loop."""
        self.loop.close()

    def _awaited(self, batch: Batch) -> dict[str, Any]:
        """What the async functions return, by name."""
        chosen = {name: own for name, own in self.own.items() if own.is_async}
        if not chosen:
            return {}
        calls = [Awaited(partial(own.awaited, batch), own.settings.timeout_s) for own in chosen.values()]
        outcomes = dict(zip(chosen, self.loop.gather(calls), strict=True))
        for name, outcome in outcomes.items():
            if outcome.error is not None:
                raise _failed(chosen[name].settings, outcome.error) from outcome.error
        return {name: outcome.result for name, outcome in outcomes.items()}


def _called(own: OwnReward, batch: Batch) -> Any:
    """What a function that is not async returns."""
    try:
        return call_within(own.settings.timeout_s, partial(own.call, batch))
    except THEIRS as error:
        raise _failed(own.settings, error) from error


def _failed(settings: NamedReward, error: BaseException) -> UserError:
    label = label_of(settings)
    if isinstance(error, Overdue):
        return UserError(
            f"{label} did not return within {settings.timeout_s:g} seconds: make it faster, or raise its timeout_s"
        )
    return UserError(f"{label} raised {describe_error(error)}")


def label_of(settings: NamedReward) -> str:
    """What a reward of `reward.functions` is called in a message."""
    return f"the reward {settings.name} ({settings.function})"


def question(prompt: Prompt) -> str:
    """The last user message of a chat."""
    return next((content for role, content in reversed(prompt.messages) if role == "user"), "")


def listed(returned: Any) -> Any:
    """What a function returned, as a list if it can be one. Raises what a generator raises."""
    iterable = hasattr(returned, "__iter__") and not isinstance(returned, (str, bytes, dict))
    return list(returned) if iterable else returned


def as_rewards(values: Any, count: int, label: str) -> list[float]:
    """What a function returned for `count` completions, `listed`, as numbers.

    Raises UserError that begins with `label`.
    """
    if not isinstance(values, list):
        raise UserError(
            f"{label} returned {type(values).__name__}: it must return a list of {counted(count, 'number')}, one per "
            "completion"
        )
    if len(values) != count:
        raise UserError(
            f"{label} returned {counted(len(values), 'reward')} for {counted(count, 'completion')}: return one for each"
        )
    rewards = []
    for i, value in enumerate(values):
        reward = _number(value)
        if reward is None:
            raise UserError(f"{label} returned {repr(value)[:60]} for completion {i}: a reward must be a number")
        rewards.append(reward)
    return rewards


def _number(value: object) -> float | None:
    """A Python, NumPy or single-element tensor number as a float, else None. The loop skips nan and inf."""
    item = getattr(value, "item", None)
    if item is not None:
        try:
            value = item()
        except (ValueError, RuntimeError):
            return None
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
