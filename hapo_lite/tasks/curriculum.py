"""A stream of prompts that depends on how often they are solved: their order, and which of them rest.

What a run has seen of a prompt is its `Standing`, which is part of the run's state. The stream itself remembers
nothing, so that a resumed run draws what the run before it would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hapo_lite.recipe import TrainingDataSettings
from hapo_lite.records import GroupResult, Standing
from hapo_lite.tasks.pass_rates import PassRates
from hapo_lite.tasks.stream import Draw, LazyPrompts, PromptStream

KEPT = 0.5
"""What is left of a prompt's earlier results when a new group of it has been graded."""


def make_stream(prompts: LazyPrompts, data: TrainingDataSettings, rates: PassRates, seed: int) -> PromptStream:
    """The stream that the section `data` asks for. rates: those of data.pass_rate.file; none without that setting."""
    if data.curriculum == "none" and not data.remembers:
        return PromptStream(prompts, seed)
    return Curriculum(prompts, data, rates, seed)


class Curriculum(PromptStream):
    """A stream with an order by pass rate, or with prompts that rest, or both.

    digest: changes with the pass rates too, where they decide the order.
    """

    def __init__(self, prompts: LazyPrompts, data: TrainingDataSettings, rates: PassRates, seed: int) -> None:
        super().__init__(prompts, seed)
        self.data = data
        ids = prompts.ids
        self.places = {name: place for place, name in enumerate(ids)}
        known = [rates.get(name) for name in ids]
        self.probed = [Standing() if rate is None else Standing(rate.right, rate.attempts) for rate in known]
        if data.curriculum != "none":
            counts = [(standing.right, standing.attempts) for standing in self.probed]
            self.digest = hashlib.sha256(f"{self.digest} {counts}".encode()).hexdigest()

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The places of an epoch. easy_first: from high to low pass rates, equal ones in the epoch's random order."""
        shuffled = super().order(epoch)
        if self.data.curriculum != "easy_first":
            return shuffled
        rates = np.array([standing.right / max(standing.attempts, 1) for standing in self.probed])
        return shuffled[np.argsort(-rates[shuffled], kind="stable")]

    def draw(self, start: int, iteration: int, standings: Mapping[str, Standing]) -> Draw:
        """The prompts of one iteration. match: each next one is drawn among the others, in proportion to its weight."""
        known = [(self.places[name], standing) for name, standing in standings.items()]
        resting = {place for place, standing in known if iteration <= standing.rests_until}
        if self.data.curriculum != "match":
            return Draw(self, start, resting=resting)
        now = list(self.probed)
        for place, standing in known:
            now[place] = standing
        # Exponential times at these rates end in the order of a draw without replacement by weight.
        # The third number tells these random numbers from those of an epoch's order.
        times = np.random.default_rng((self.seed, iteration, 1)).exponential(size=len(now)) / weights(now)
        return Draw(self, start, np.argsort(times, kind="stable"), resting)

    def after(
        self, standings: Mapping[str, Standing], results: Sequence[GroupResult], iteration: int
    ) -> Mapping[str, Standing]:
        """The standings with an iteration's groups added."""
        if not self.data.remembers:
            return standings
        changed = dict(standings)
        for result in results:
            before = changed.get(result.prompt, self.probed[self.places[result.prompt]])
            changed[result.prompt] = self._after_group(before, result, iteration)
        return changed

    def _after_group(self, before: Standing, result: GroupResult, iteration: int) -> Standing:
        rest = self.data.rest
        in_a_row = before.solved_in_a_row + 1 if result.right == result.attempts else 0
        tired = rest.solved is not None and in_a_row >= rest.solved
        return Standing(
            KEPT * before.right + result.right,
            KEPT * before.attempts + result.attempts,
            in_a_row,
            iteration + rest.iterations if tired else before.rests_until,
        )


def weights(standings: Sequence[Standing]) -> NDArray[np.float64]:
    """How often each prompt is drawn under `match`, up to a factor: [N], all above 0.

    A reward that is right with probability p has variance p (1 - p), which is largest at one half and 0 where every
    completion of a group earns the same. p is known from few completions, so the weight is the expectation of
    p (1 - p) over a Beta distribution with `right` and `attempts - right` observations on Jeffreys' prior:
    a b / ((a + b) (a + b + 1)) with a = right + 1/2 and b = attempts - right + 1/2.
    """
    right = np.array([standing.right for standing in standings], dtype=np.float64)
    a = right + 0.5
    b = np.array([standing.attempts for standing in standings], dtype=np.float64) - right + 0.5
    return a * b / ((a + b) * (a + b + 1.0))
