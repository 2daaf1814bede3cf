"""A check that the merged model is the trained one, by log-probabilities and greedy answers.

The reference is the adapter on its base. Merging rounds W + B A to the weights' dtype and loses nothing else, so the
difference has to be small by two measures: a fixed tolerance, and a fraction of what the adapter itself changes. A
merge that has no effect, or a wrong scale, differs from the reference about as much as the base does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.export.probes import Probes, Text, answers, logprobs
from hapo_lite.model.policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest allowed mean difference of log-probabilities, nats a token, by the dtype of the written weights."""
FRACTION = 0.25
"""Largest allowed mean difference, as a fraction of what the adapter changes."""
TIE = 3.0
"""Two tokens whose log-probabilities are within this many tolerances are a tie, where greedy answers may part."""


@dataclass(frozen=True)
class Reference:
    """The results of the adapter on its base, which other models are compared with.

    texts: the completions that are scored. logp: their log-probabilities, [all T], nats. answers: the greedy answers
    to the prompts.
    """

    texts: tuple[Text, ...]
    logp: Tensor
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Drift:
    """The difference between the merged model and the adapter on its base.

    tokens: number of tokens compared. mean, largest: |difference| of log-probabilities, nats a token. effect: the mean
    |difference| between the base and the adapter on it. same, ties, other: numbers of greedy answers. `same` are equal,
    `ties` part where both tokens are about equally likely, and `other` are the rest.
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
        """The largest mean difference that is accepted, nats a token."""
        return min(self.tolerance, FRACTION * self.effect)

    def problem(self) -> str | None:
        """A clause that says why the merged model is refused, with the numbers; None if it is accepted."""
        numbers = (
            f"{self.mean:.2g} nats a token from the adapter on its base ({self.allowed:.2g} allowed: at most "
            f"{self.tolerance:g}, and a quarter of the {self.effect:.2g} that the adapter changes), and of "
            f"{self.same + self.ties + self.other} greedy answers {self.same} are the same, {self.ties} part at a tie "
            f"and {self.other} differ"
        )
        if self.mean <= self.allowed and not self.other:
            return None
        if FRACTION * self.effect < self.mean <= self.tolerance and not self.other:
            return (
                f"{numbers}: either the adapter changes less than rounding to {self.dtype} does, or the merge is "
                "wrong; --dtype fp32 tells, and --to adapter needs no merge"
            )
        rounding = "" if self.dtype == "float32" else f", or --dtype fp32 if rounding to {self.dtype} made it so"
        return f"{numbers}: it is not the model that was trained; use --to adapter{rounding}"

    def sentence(self) -> str:
        """The comparison in one sentence, with the numbers."""
        return (
            f"reloaded from disk, the merged model is {self.mean:.2g} nats a token from the adapter on its base, at "
            f"most {self.largest:.2g}, over {self.tokens:,} tokens ({self.allowed:.2g} allowed; the adapter itself "
            f"changes {self.effect:.2g}); greedy answers: {self.same} the same, {self.ties} part at a tie, "
            f"{self.other} differ"
        )


def refer(policy: Policy, probes: Probes, texts: tuple[Text, ...] = ()) -> Reference:
    """The reference, computed by the adapter on its base.

    texts: what is scored; by default the texts of the probes and the greedy answers.
    """
    written = answers(policy, probes.prompts)
    texts = texts or (*probes.texts, *zip(probes.prompts, written, strict=True))
    return Reference(texts, logprobs(policy, texts), tuple(written))


def effect_of_adapter(policy: Policy, reference: Reference) -> float:
    """The mean |difference| of log-probabilities between the base and the reference, nats a token."""
    with policy.base_alone():
        return float((logprobs(policy, reference.texts) - reference.logp).abs().mean())


def measure_drift(merged: Policy, probes: Probes, reference: Reference, effect: float, dtype: torch.dtype) -> Drift:
    """Compare the merged model with the reference.

    merged: the model as read back from disk. effect: from `effect_of_adapter`. dtype: that of the written weights.
    """
    gap = (logprobs(merged, reference.texts) - reference.logp).abs()
    tolerance = TOLERANCE[dtype]
    kinds = {"same": 0, "ties": 0, "other": 0}
    for prompt, answer, expected in zip(
        probes.prompts, answers(merged, probes.prompts), reference.answers, strict=True
    ):
        kinds[_kind(merged, prompt, answer, expected, TIE * tolerance)] += 1
    return Drift(
        dtype=str(dtype).removeprefix("torch."),
        tokens=gap.numel(),
        mean=float(gap.mean()),
        largest=float(gap.max()),
        effect=effect,
        tolerance=tolerance,
        **kinds,
    )


def _kind(
    merged: Policy, prompt: tuple[int, ...], answer: tuple[int, ...], expected: tuple[int, ...], within: float
) -> str:
    """The field of Drift that counts this answer. within: largest difference that makes a tie, nats."""
    if answer == expected:
        return "same"
    where = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), None)
    if where is None:
        return "other"  # One answer goes on where the other has stopped, without a stop token.
    before = (*prompt, *answer[:where])
    own, other = logprobs(merged, [(before, (answer[where],)), (before, (expected[where],))]).tolist()
    return "ties" if abs(own - other) <= within else "other"
