"""Rewards: the number of a completion comes from its grade or from your own function (docs/rewards.md)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from hapo_lite.errors import UserError
from hapo_lite.recipe import RewardSettings
from hapo_lite.records import Prompt, Score
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.data import ARGUMENTS, Column
from hapo_lite.tasks.deadline import THEIRS
from hapo_lite.tasks.functions import OURS, Batch, NamedRewards, as_rewards, listed, question, soft_overlong_penalty
from hapo_lite.tasks.own_code import code_of, describe_error, load_function
from hapo_lite.tasks.verify import Grade, GraderPool, marked_answer

RewardFunction = Callable[[list[str], list[str], list[str]], Sequence[float]]
"""(questions, completions, gold answers) -> rewards, all of the same length."""
BY_PLACE = ("prompts", "completions", "answers")
"""What a RewardFunction is handed, in this order."""


def notes_on_code(settings: RewardSettings) -> list[str]:
    """A sentence about each function that a run imports, with its file, found without importing it."""
    functions = {"reward.function": settings.function} if settings.function else {}
    functions |= {f"the reward {r.name}": r.function for r in settings.functions if r.function not in OURS}
    return [
        f"note: {what} is code, which runs with your rights: {code_of(function)}"
        for what, function in functions.items()
    ]


def load_reward_function(name: str) -> RewardFunction:
    """The function of `reward.function`. Raises UserError if it cannot be loaded or called with three lists by place.

    A parameter may have any name but that of something else that a reward can be handed.
    """
    function = load_function(name)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return function  # such as a function of a library in C, which the first call tries
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    taken = f"reward.function {name} takes {inspect.Signature(bare)}"
    handed = f"it is handed three lists by their place, ({', '.join(BY_PLACE)})"
    advice = "change it, or name it in reward.functions, which hands a function what its arguments are called"
    try:
        places = signature.bind(*BY_PLACE).arguments
    except TypeError as error:
        raise UserError(f"{taken}, and {handed} ({error}): {advice}") from None
    for parameter, value in places.items():
        if parameter in ARGUMENTS and parameter != value:
            raise UserError(f"{taken}, and {handed}, so {value} as {parameter}: {advice}")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"reward.function {name} is async, and only reward.functions awaits functions: {advice}")
    return function


class Scorer:
    """Scores completions as the recipe's `reward` section says. Close it, or use it as a context manager.

    max_new_tokens: longest completion, tokens; only rewards by length need it. progress: is told of every answer that
    is graded, and may be replaced. opening: what every prompt ends with that belongs to the completion when it is
    graded, such as `<think>` (`Policy.opening`); functions are handed the completion as it is. Raises UserError if a
    function of the section cannot be loaded.
    """

    opening = ""

    def __init__(self, settings: RewardSettings, max_new_tokens: int) -> None:
        self.settings = settings
        self.max_new_tokens = max_new_tokens
        self.progress = Progress()
        self._function = load_reward_function(settings.function) if settings.function else None
        self._named = NamedRewards.load(settings)
        self._pool = GraderPool(settings.workers, settings.timeout_s)

    @property
    def columns(self) -> list[Column]:
        """The columns of the training data that `reward.functions` ask for."""
        return self._named.columns

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        lengths: Sequence[int],
        truncated: Sequence[bool],
        iteration: int | None = None,
    ) -> list[Score]:
        r"""One Score per completion. All lists have the same length; lengths are in tokens.

        A truncated completion is graded by its `<answer>` tag or `\boxed{...}` alone: a number that happens to stand
        near the cut is no answer. With `reward.function` the reward comes from the function, and answers are graded all
        the same. The overlong penalty is added to either. With `reward.functions` the reward is their weighted sum.
        iteration: that of the training; None in an evaluation, which grades answers and asks no `reward.functions`.
        Raises UserError if a function fails or returns anything but a number per completion.
        """
        if not len(prompts) == len(completions) == len(lengths) == len(truncated):
            raise ValueError(
                f"prompts, completions, lengths and truncated must be as many; they are {len(prompts)}, "
                f"{len(completions)}, {len(lengths)} and {len(truncated)}"
            )
        grades = self._grade(prompts, completions, truncated)
        if self.settings.functions and iteration is not None:
            batch = Batch(prompts, completions, lengths, truncated, grades, iteration, self.max_new_tokens)
            by_name = self._named.of(batch)
            return [
                Score(self._named.total(rewards), grade.correct, grade.outcome, grade.answer, rewards)
                for rewards, grade in zip(by_name, grades, strict=True)
            ]
        rewards = self._single(prompts, completions, grades)
        s = self.settings
        penalties = [
            soft_overlong_penalty(n, self.max_new_tokens, s.overlong_buffer, s.overlong_penalty) for n in lengths
        ]
        return [
            Score(reward + penalty, grade.correct, grade.outcome, grade.answer)
            for reward, penalty, grade in zip(rewards, penalties, grades, strict=True)
        ]

    def close(self) -> None:
        """End the grading processes and the thread of async functions."""
        self._pool.close()
        self._named.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grade(self, prompts: Sequence[Prompt], completions: Sequence[str], truncated: Sequence[bool]) -> list[Grade]:
        grades = [Grade(False, None, "unparseable")] * len(completions)
        texts = [self.opening + completion for completion in completions]
        complete = [i for i, cut in enumerate(truncated) if not cut or marked_answer(texts[i]) is not None]
        pairs = [(texts[i], prompts[i].answer) for i in complete]
        self.progress.advance(len(completions) - len(complete))
        for i, grade in zip(complete, self._pool.grade_many(pairs, graded=self.progress.advance), strict=True):
            grades[i] = grade
        return grades

    def _single(self, prompts: Sequence[Prompt], completions: Sequence[str], grades: Sequence[Grade]) -> list[float]:
        """The reward of each completion by `reward.function`, or by its grade."""
        if self._function is None:
            return [self.settings.correct if grade.correct else self.settings.wrong for grade in grades]
        label = f"reward.function {self.settings.function}"
        questions = [question(prompt) for prompt in prompts]
        try:
            values = listed(self._function(questions, list(completions), [prompt.answer for prompt in prompts]))
        except THEIRS as error:
            raise UserError(f"{label} raised {describe_error(error)}") from error
        return as_rewards(values, len(completions), label)
