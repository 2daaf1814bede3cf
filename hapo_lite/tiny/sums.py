"""The built-in task that needs exploring: which of the given numbers add up to the target.

A problem is `19 30 39 45 51 53: 2 make 104?`, and its only answer is `51,53`. `write_solution` answers as an impatient
student would, who takes numbers at random and adds them up, gives up after a try or two, and then guesses. Now and then
he subtracts from the target instead, and looks whether what is left is one of the numbers, which finds the answer in
fewer tries. The bundled model `tiny_sums` imitates him. It solves few problems at its first attempt and not all in 64,
so training can let it solve more of them, and not only the same ones more often.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from dataclasses import dataclass

from hapo_lite.tiny.splits import in_split

LARGEST = 60
"""The numbers are different and between 1 and this."""
LEVELS = ((2, 6), (2, 8), (3, 8), (3, 10), (4, 10))
"""How many numbers are to be found among how many, from easy to hard. Each level has as many problems."""
PROBLEMS = 12_000
"""The problems of both splits."""


@dataclass(frozen=True)
class Sum:
    """One problem. numbers: ascending; chosen: those that make the target, ascending."""

    numbers: tuple[int, ...]
    chosen: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))}: {len(self.chosen)} make {sum(self.chosen)}?"

    @property
    def answer(self) -> str:
        return ",".join(map(str, self.chosen))

    @property
    def level(self) -> tuple[int, int]:
        """How many numbers are to be found among how many."""
        return len(self.chosen), len(self.numbers)


@functools.cache
def all_problems() -> tuple[Sum, ...]:
    """Every problem of the task, in a fixed order. Each has one answer alone."""
    rng = random.Random("sums")
    found = {}
    for index in range(PROBLEMS):
        count, size = LEVELS[index % len(LEVELS)]
        while True:
            numbers = tuple(sorted(rng.sample(range(1, LARGEST + 1), size)))
            ways = Counter(map(sum, itertools.combinations(numbers, count)))
            problem = Sum(numbers, tuple(sorted(rng.sample(numbers, count))))
            if ways[sum(problem.chosen)] == 1 and problem.prompt not in found:
                break
        found[problem.prompt] = problem
    return tuple(found.values())


def problems(split: str, seed: int = 0) -> list[Sum]:
    """The "train" or the "test" problems, shuffled by `seed`. Raises ValueError for another split."""
    return in_split(all_problems(), split, seed)


@dataclass(frozen=True)
class Patience:
    """Probabilities that a student subtracts from the target at a try, and that he gives up after one that failed."""

    subtract: float = 0.12
    give_up: float = 0.6


def write_solution(problem: Sum, patience: Patience, rng: random.Random, tries: int = 6) -> str:
    """One student's solution, ending in `\\boxed{...}`. tries: after as many he guesses."""
    text = ""
    for _ in range(tries):
        attempt = _subtracted if rng.random() < patience.subtract else _added
        line, numbers = attempt(problem, rng)
        if sum(numbers) == sum(problem.chosen) and len(set(numbers)) == len(numbers):
            return rf"{text}{line} yes. \boxed{{{','.join(map(str, numbers))}}}"
        text += f"{line} no. "
        if rng.random() < patience.give_up:
            break
    guess = sorted(rng.sample(problem.numbers, len(problem.chosen)))
    return rf"{text}\boxed{{{','.join(map(str, guess))}}}"


def worked_out(problem: Sum) -> str:
    """The solution of a student who subtracts the right numbers at once, in an order that the problem decides."""
    order = list(problem.chosen)
    random.Random(problem.prompt).shuffle(order)
    line = _subtraction(sum(order), order[:-1])
    return rf"{line} yes. \boxed{{{','.join(map(str, order))}}}"


def _added(problem: Sum, rng: random.Random) -> tuple[str, tuple[int, ...]]:
    """A try that adds up numbers taken at random: its text, and the numbers."""
    numbers = tuple(rng.sample(problem.numbers, len(problem.chosen)))
    text, total = str(numbers[0]), numbers[0]
    for number in numbers[1:]:
        total += number
        text += f"+{number}={total}"
    return text, numbers


def _subtracted(problem: Sum, rng: random.Random) -> tuple[str, tuple[int, ...]]:
    """A try that takes all numbers but one at random and subtracts them: its text, and the numbers with what is left.

    What is left need not be one of the problem's numbers; the caller sees that the sum is right only if it is.
    """
    target = sum(problem.chosen)
    while True:
        taken = rng.sample(problem.numbers, len(problem.chosen) - 1)
        if sum(taken) < target:
            break
    left = target - sum(taken)
    found = left in problem.numbers and left not in taken
    return _subtraction(target, taken), (*taken, left) if found else tuple(taken)


def _subtraction(target: int, taken: list[int]) -> str:
    text = str(target)
    for number in taken:
        target -= number
        text += f"-{number}={target}"
    return text
