"""Rewards: the number of a completion comes from its grade or from your own function (docs/rewards.md)."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from hapo_lite.errors import UserError
from hapo_lite.recipe import RewardSettings
from hapo_lite.records import Prompt, Score
from hapo_lite.runs.progress import Progress
from hapo_lite.tasks.verify import Grade, GraderPool, marked_answer

RewardFunction = Callable[[list[str], list[str], list[str]], Sequence[float]]
"""(questions, completions, gold answers) -> rewards, all of the same length."""


def soft_overlong_penalty(length: int, max_new_tokens: int, buffer: int, penalty: float = 1.0) -> float:
    """DAPO's length penalty (arXiv 2503.14476, Eq. 13), in [-penalty, 0]; lengths in tokens.

    0 up to max_new_tokens - buffer, then falling linearly to -penalty at max_new_tokens. buffer 0: always 0.
    """
    over = length - (max_new_tokens - buffer)
    if buffer == 0 or over <= 0:
        return 0.0
    return -penalty * min(over / buffer, 1.0)


class Scorer:
    """Scores completions as the recipe's `reward` section says. Close it, or use it as a context manager.

    max_new_tokens: longest completion, tokens; only the overlong penalty needs it. progress: is told of every answer
    that is graded, and may be replaced. Raises UserError if `reward.function` cannot be loaded.
    """

    def __init__(self, settings: RewardSettings, max_new_tokens: int) -> None:
        self.settings = settings
        self.max_new_tokens = max_new_tokens
        self.progress = Progress()
        self._function = load_function(settings.function) if settings.function else None
        self._pool = GraderPool(settings.workers, settings.timeout_s)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], lengths: Sequence[int], truncated: Sequence[bool]
    ) -> list[Score]:
        r"""One Score per completion. All arguments have the same length; lengths are in tokens.

        A truncated completion is graded by its `<answer>` tag or `\boxed{...}` alone: a number that happens to stand
        near the cut is no answer. With `reward.function` the reward comes from the function, and answers are graded all
        the same. The overlong penalty is added to either. Raises UserError if the function fails or returns anything
        but a number per completion.
        """
        if not len(prompts) == len(completions) == len(lengths) == len(truncated):
            raise ValueError(
                f"prompts, completions, lengths and truncated must be as many; they are {len(prompts)}, "
                f"{len(completions)}, {len(lengths)} and {len(truncated)}"
            )
        grades = self._grade(prompts, completions, truncated)
        if self._function:
            rewards = self._call(self._function, prompts, completions)
        else:
            rewards = [self.settings.correct if grade.correct else self.settings.wrong for grade in grades]
        s = self.settings
        penalties = [
            soft_overlong_penalty(n, self.max_new_tokens, s.overlong_buffer, s.overlong_penalty) for n in lengths
        ]
        return [
            Score(reward + penalty, grade.correct, grade.outcome, grade.answer)
            for reward, penalty, grade in zip(rewards, penalties, grades, strict=True)
        ]

    def close(self) -> None:
        """End the grading processes."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grade(self, prompts: Sequence[Prompt], completions: Sequence[str], truncated: Sequence[bool]) -> list[Grade]:
        grades = [Grade(False, None, "unparseable")] * len(completions)
        complete = [i for i, cut in enumerate(truncated) if not cut or marked_answer(completions[i]) is not None]
        pairs = [(completions[i], prompts[i].answer) for i in complete]
        self.progress.advance(len(completions) - len(complete))
        for i, grade in zip(complete, self._pool.grade_many(pairs, graded=self.progress.advance), strict=True):
            grades[i] = grade
        return grades

    def _call(self, function: RewardFunction, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        name, count = self.settings.function, len(completions)
        questions = [_question(prompt) for prompt in prompts]
        try:
            returned = function(questions, list(completions), [prompt.answer for prompt in prompts])
            iterable = hasattr(returned, "__iter__") and not isinstance(returned, (str, bytes, dict))
            values = list(returned) if iterable else None
        except (Exception, SystemExit) as error:
            raise UserError(f"reward.function {name} raised {_describe(error)}") from error
        if values is None:
            raise UserError(
                f"reward.function {name} returned {type(returned).__name__}: it must return a list of {count} numbers, "
                "one per completion"
            )
        if len(values) != count:
            raise UserError(
                f"reward.function {name} returned {len(values)} rewards for {count} completions: return one for each"
            )
        rewards = []
        for i, value in enumerate(values):
            reward = _number(value)
            if reward is None:
                raise UserError(
                    f"reward.function {name} returned {repr(value)[:60]} for completion {i}: a reward must be a number"
                )
            rewards.append(reward)
        return rewards


def load_function(name: str) -> RewardFunction:
    """The function behind `module:function` or `path/to/file.py:function`.

    Modules are looked for where Python does and in the current directory. Raises UserError.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise UserError(
            f"reward.function {name!r} is not of the form module:function, such as my_rewards:brevity or "
            "path/to/file.py:brevity"
        )
    try:
        module = _module_from_file(Path(where), name) if where.endswith(".py") else _module(where, name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward.function {name}: importing {where} raised {_describe(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(
            f"reward.function {name}: {where} has no function {attribute!r}; it has {', '.join(there) or 'none at all'}"
        )
    return function


def code_of(name: str) -> str:
    """The file that `reward.function` would import, found without importing it; the module's name where there is none.

    A module in a package stands for the package, so the file is the package's.
    """
    where = name.rpartition(":")[0]
    if where.endswith(".py"):
        return str(Path(where).resolve())
    spec = importlib.machinery.PathFinder.find_spec(where.partition(".")[0], [*sys.path, os.getcwd()])
    return spec.origin if spec and spec.origin else where


def _module(where: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(f"{error.name}.")):
            raise
        raise UserError(
            f"reward.function {name}: there is no module {error.name!r} in {os.getcwd()} or among the installed ones"
        ) from None


def _module_from_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"reward.function {name}: there is no file {path.resolve()}")
    spec = importlib.util.spec_from_file_location(f"hapo_lite_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"reward.function {name}: Python cannot import {path.resolve()}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _question(prompt: Prompt) -> str:
    return next((content for role, content in reversed(prompt.messages) if role == "user"), "")


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


def _describe(error: BaseException) -> str:
    """The type and message of an error, and the innermost place outside Python's own and installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        f
        for f in frames
        if Path(f.filename) != Path(__file__)
        and "site-packages" not in f.filename
        and not f.filename.startswith(("<", sys.base_prefix, sys.prefix))
    ]
    place = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' + message if message else ''}{place}"
