"""The tokens of an iteration that its method singles out, from random numbers that belong to each completion.

A completion's numbers depend on the run's seed, the iteration, the prompt and the sample alone. The selection is thus
the same for any micro-batch size, on any number of processes, and after a resume.

Axes: T tokens of one completion, N tokens of an iteration, flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.selection import advantage_factor
from hapo_lite.records import Completion
from hapo_lite.rollout.draws import DrawKey, uniforms


@dataclass(frozen=True)
class Draws:
    """Three random numbers in [0, 1) for each token: [3, T] for each completion, fp64. None for a method that does not
    draw."""

    rows: list[Tensor]

    @classmethod
    def of(cls, method: Method, key: DrawKey, completions: Sequence[Completion]) -> Draws:
        """The numbers of these completions. key: of the stage `Stage.SELECTION`."""
        if not method.draws:
            return cls([])
        return cls([uniforms(key, c.prompt.index, c.sample, 3 * c.length).view(3, -1) for c in completions])

    def drawn(self, method: Method) -> list[Tensor] | None:
        """The tokens that `trained_tokens: random` trains, bool [T] each; None for a method without it."""
        if method.trained_tokens != "random":
            return None
        return [row[0] >= method.quantile for row in self.rows]

    def kept(self, method: Method) -> list[Tensor] | None:
        """The tokens that `token_share` keeps, bool [T] each; None for a method that keeps all."""
        if method.token_share == 1.0:
            return None
        return [row[1] < method.token_share for row in self.rows]

    def factor(
        self,
        method: Method,
        completions: Sequence[Completion],
        advantage: Tensor,
        old_logp: Sequence[Tensor],
        entropy: Sequence[Tensor],
    ) -> list[Tensor] | None:
        """The factors of `algo.selection.advantage_factor`, [T] each; None for a method without any.

        advantage: [B]. old_logp, entropy: [T] each. Completions that the method leaves out are not looked at.
        """
        if not method.singles_out:
            return None
        found = [torch.ones_like(logp) for logp in old_logp]
        rows = [i for i, c in enumerate(completions) if not method.leaves_out(c.truncated)]
        if not rows:
            return found
        logp = torch.cat([old_logp[i] for i in rows])
        factor = advantage_factor(
            method,
            logp,
            torch.cat([advantage[i].expand(completions[i].length) for i in rows]),
            torch.cat([entropy[i] for i in rows]),
            torch.cat([self.rows[i][2] for i in rows]) if self.rows else torch.zeros_like(logp),
        )
        for i, row in zip(rows, factor.split([completions[i].length for i in rows]), strict=True):
            found[i] = row
        return found
