"""The built-in task: three-number arithmetic with precedence, and the ways a student may write it down.

A problem is `a+b*c=?`, `b*c+a=?` or `a-b*c=?`. `write_solution` answers a problem as one of several students would: one
computes the product first and continues step by step (right), one adds first (wrong), one stops half-way and guesses,
and one guesses at once. The bundled model imitates this mixture, so its completions contain decisions between
strategies. Reinforcement learning can improve these decisions: no new skill is needed, only better choices.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hapo_lite.tiny.splits import in_split

STEP_OPENERS = ("First", "Start with", "Take")
GUESS_OPENER = "Clearly"
CLOSERS = ("So", "Thus", "Answer:")


@dataclass(frozen=True)
class Problem:
    """One expression. form: `a+b*c`, `b*c+a` or `a-b*c`."""

    form: str
    a: int
    b: int
    c: int

    @property
    def prompt(self) -> str:
        text = self.form.replace("a", str(self.a)).replace("b", str(self.b)).replace("c", str(self.c))
        return f"{text}=?"

    @property
    def answer(self) -> int:
        product = self.b * self.c
        return self.a - product if self.form == "a-b*c" else self.a + product


def all_problems() -> Iterator[Problem]:
    """Every problem of the task, about 15,000, in a fixed order."""
    for form in ("a+b*c", "b*c+a", "a-b*c"):
        for b in range(2, 10):
            for c in range(2, 10):
                for a in range(2, 100):
                    if form != "a-b*c" or a >= b * c:
                        yield Problem(form, a, b, c)


def problems(split: str, seed: int = 0) -> list[Problem]:
    """The "train" or the "test" problems, shuffled by `seed`. Raises ValueError for another split."""
    return in_split(all_problems(), split, seed)


@dataclass(frozen=True)
class Habits:
    """Probabilities that a student guesses at once, adds first, or stops after a step, and that a guess is off."""

    guess: float = 0.25
    add_first: float = 0.35
    skip: float = 0.3
    slip: float = 0.9


def write_solution(problem: Problem, habits: Habits, rng: random.Random) -> str:
    """One student's solution, ending in `\\boxed{...}`."""
    if rng.random() < habits.guess:
        return rf"{GUESS_OPENER} \boxed{{{_guess(problem, habits, rng)}}}"
    a, b, c = problem.a, problem.b, problem.c
    if rng.random() >= habits.add_first:
        first, partial = f"{b}*{c}", b * c
        second = problem.form.replace("b*c", str(partial)).replace("a", str(a))
        answer = problem.answer
    else:
        if problem.form == "b*c+a":
            partial = c + a
            first = f"{c}+{a}"
            second, answer = f"{b}*{partial}", b * partial
        elif problem.form == "a-b*c":
            partial = a - b
            first = f"{a}-{b}"
            second, answer = f"{partial}*{c}", partial * c
        else:
            partial = a + b
            first = f"{a}+{b}"
            second, answer = f"{partial}*{c}", partial * c
    text = f"{rng.choice(STEP_OPENERS)} {first}={partial}"
    closer = rng.choice(CLOSERS)
    if rng.random() < habits.skip:
        return rf"{text}. {closer} \boxed{{{_guess(problem, habits, rng)}}}"
    return rf"{text}, then {second}={answer}. {closer} \boxed{{{answer}}}"


def worked_out(problem: Problem) -> str:
    """The solution of a student who makes no mistake, in wording that depends on the problem alone."""
    return write_solution(problem, Habits(guess=0.0, add_first=0.0, skip=0.0), random.Random(problem.prompt))


def _guess(problem: Problem, habits: Habits, rng: random.Random) -> int:
    """The answer, or with probability `slip` a number near it."""
    if rng.random() >= habits.slip:
        return problem.answer
    return abs(problem.answer + rng.choice((-1, 1)) * rng.choice((1, 2, 3, 5, 10, 20)))
