"""Is the merged model what was trained? Its log-probabilities and greedy answers beside those of adapter-on-base.

Merging rounds W + B A to the weights' dtype, and nothing else is lost. So the difference is small against two measures:
a fixed one, and what the adapter itself changes. A merge without effect, or at a wrong scale, differs from the adapter
by as much as the adapter from the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.export.probes import Probes, Text, answers, logprobs
from hapo_lite.model.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Most that the log-probabilities may differ by on average, nats a token, by the dtype of the written weights."""
SHARE = 0.25
"""And most of it as a share of what the adapter changes."""
TIE = 3.0
"""A greedy answer may go another way where the two tokens are within so many tolerances of each other."""


@dataclass(frozen=True)
class Reference:
    """What a model says: log-probabilities of `texts` [T of all], nats, and its greedy answers to the prompts."""

    texts: tuple[Text, ...]
    logp: Tensor
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Drift:
    """merged against adapter-on-base. mean, largest: |difference| of log-probabilities, nats a token, over `tokens`.

    effect: the same mean between base and adapter-on-base. same, ties, other: of the greedy answers, the equal ones,
    those that part where both tokens are as good as equally likely, and the rest.
    """

    dtype: str
    tokens: int
    mean: float
    largest: float
    effect: float
    tolerance: float
    same: int
    ties: int
    other: int

    @property
    def allowed(self) -> float:
        return min(self.tolerance, SHARE * self.effect)

    def problem(self) -> str | None:
        """Why the merged model may not be passed on, with the numbers; None: it may."""
        numbers = (
            f"{self.mean:.2g} nats a token from the adapter on its base ({self.allowed:.2g} allowed: at most "
            f"{self.tolerance:g}, and a quarter of the {self.effect:.2g} that the adapter changes), and of "
            f"{self.same + self.ties + self.other} greedy answers {self.same} are the same, {self.ties} part at a tie "
            f"and {self.other} differ"
        )
        if self.mean <= self.allowed and not self.other:
            return None
        if SHARE * self.effect < self.mean <= self.tolerance and not self.other:
            return (
                f"{numbers}: either the adapter changes less than rounding to {self.dtype} does, or the merge is "
                "wrong; --dtype fp32 tells, and --to adapter needs no merge"
            )
        rounding = "" if self.dtype == "float32" else f", or --dtype fp32 if rounding to {self.dtype} made it so"
        return f"{numbers}: it is not the model that was trained; use --to adapter{rounding}"

    def sentence(self) -> str:
        return (
            f"reloaded from disk, the merged model is {self.mean:.2g} nats a token from the adapter on its base, at "
            f"most {self.largest:.2g}, over {self.tokens:,} tokens ({self.allowed:.2g} allowed; the adapter itself "
            f"changes {self.effect:.2g}); greedy answers: {self.same} the same, {self.ties} part at a tie, "
            f"{self.other} differ"
        )


@dataclass(frozen=True)
class QuantisationGap:
    """Adapter on the 4-bit base it was trained on, against adapter on the 16-bit base; as in Drift."""

    tokens: int
    mean: float
    largest: float
    same: int
    prompts: int

    def sentence(self) -> str:
        return (
            f"training saw the 4-bit base: there the adapter is {self.mean:.2g} nats a token away, at most "
            f"{self.largest:.2g}, and {self.same} of {self.prompts} greedy answers are the same"
        )


def refer(policy: Policy, probes: Probes) -> tuple[Reference, float]:
    """What adapter-on-base says, and the mean |difference| of the base without it, nats a token."""
    written = answers(policy, probes.prompts)
    texts = (*probes.texts, *zip(probes.prompts, written, strict=True))
    logp = logprobs(policy, texts)
    with policy.base_alone():
        effect = (logprobs(policy, texts) - logp).abs().mean()
    return Reference(texts, logp, tuple(written)), float(effect)


def drift(merged: Policy, probes: Probes, reference: Reference, effect: float, dtype: torch.dtype) -> Drift:
    """merged: as read back from disk."""
    gap = (logprobs(merged, reference.texts) - reference.logp).abs()
    tolerance = TOLERANCE[dtype]
    kinds = {"same": 0, "ties": 0, "other": 0}
    for prompt, mine, theirs in zip(probes.prompts, answers(merged, probes.prompts), reference.answers, strict=True):
        kinds[_kind(merged, prompt, mine, theirs, TIE * tolerance)] += 1
    return Drift(
        dtype=str(dtype).removeprefix("torch."),
        tokens=gap.numel(),
        mean=float(gap.mean()),
        largest=float(gap.max()),
        effect=effect,
        tolerance=tolerance,
        **kinds,
    )


def _kind(merged: Policy, prompt: tuple[int, ...], mine: Sequence[int], theirs: Sequence[int], within: float) -> str:
    """within: nats between the two tokens where the answers part, for a tie."""
    if tuple(mine) == tuple(theirs):
        return "same"
    where = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if where is None:
        return "other"  # One goes on where the other has stopped, without a stop token.
    before = (*prompt, *mine[:where])
    own, other = logprobs(merged, [(before, (mine[where],)), (before, (theirs[where],))]).tolist()
    return "ties" if abs(own - other) <= within else "other"


def quantisation_gap(four_bit: Policy, probes: Probes, reference: Reference) -> QuantisationGap:
    gap = (logprobs(four_bit, reference.texts) - reference.logp).abs()
    same = sum(a == b for a, b in zip(answers(four_bit, probes.prompts), reference.answers, strict=True))
    return QuantisationGap(gap.numel(), float(gap.mean()), float(gap.max()), same, len(probes.prompts))
