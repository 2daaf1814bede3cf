"""One rule against another on a recorded run: every recorded token of an iteration under two methods.

What was recorded stays as it is: the ratio of each token at its update, its entropy, the signal of the iteration, and
the advantage of its completion, which the run's own rule gave it in its group. From these, `hapo_lite.algo` computes
what each method does with the token. Axes: B completions, T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hapo_lite.algo.advantage import entropy_scale
from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, PolicyLoss, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.selection import advantage_factor
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.surrogate import Credit
from hapo_lite.algo.tokens import TokenSignals, trained_tokens, uncertain_tokens
from hapo_lite.errors import UserError
from hapo_lite.records import pad
from hapo_lite.runs.trace import Trace

AS_IN_RUN = "as in the run"
"""The choice of a run's own method, with its constants."""
REPLAYABLE = tuple(name for name, method in PRESETS.items() if not method.draws)
"""The presets that a trace can be put under. The others draw tokens at random, and a trace does not hold the draws."""
TREATMENTS = ("amplified", "kept", "suppressed", "stopped low", "stopped high", "left out")
"""What a rule can do with a token, one of them to each. Amplified, kept, suppressed: the credit is larger than the
advantage of the completion, equal, or smaller. Stopped low, stopped high: a bound stops the gradient (stopped high also
by the dual clip). Left out: the token has no credit."""
NEEDED = ("ratio", "advantage", "logp_old")
"""The lists of a trace that an update adds and that a rule needs."""
PLACES = ((True, True), (True, False), (False, True), (False, False))
"""The quadrants: (uncertain, A > 0)."""
SEVEN_DIGITS = 1e-6
"""Relative difference below which two numbers of a trace count as equal: a trace keeps seven digits."""


@dataclass(frozen=True)
class Ruled:
    """One completion under one rule, [T] each. gradient: that of the loss's fall by the token's log-probability, so a
    positive one raises the token's probability. treatment: of TREATMENTS. clipped: "low", "high" or ""."""

    credit: list[float]
    lower: list[float]
    upper: list[float]
    gradient: list[float]
    treatment: list[str]

    @property
    def clipped(self) -> list[str]:
        """The bound that stops each token's gradient, as in `Trace`."""
        return [name.removeprefix("stopped ") if name.startswith("stopped") else "" for name in self.treatment]


@dataclass(frozen=True)
class Quadrant:
    """Tokens that are uncertain or certain, of completions with A > 0 or A < 0.

    left, right: their share of the sum of |gradient| under each rule; 0 where a rule has no gradient at all.
    """

    tokens: int
    left: float
    right: float


@dataclass(frozen=True)
class RuleComparison:
    """Two rules on the same completions. left, right: by completion. pairs: tokens by (treatment left, right).

    quadrants: by (uncertain, A > 0). Tokens of completions with A = 0 are in none.
    """

    left: list[Ruled]
    right: list[Ruled]
    pairs: Counter[tuple[str, str]]
    quadrants: dict[tuple[bool, bool], Quadrant]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.pairs.total()

    @property
    def differing(self) -> int:
        """Tokens that the two rules treat differently."""
        return sum(count for (left, right), count in self.pairs.items() if left != right)


def choose_rule(name: str, own: Method) -> Method:
    """The method of that name: AS_IN_RUN or a preset. own: the method of the run.

    A preset takes the quantile and the floor of the run, since the recorded signal was fitted with them. Raises
    UserError for another name, and for a method that draws its tokens at random.
    """
    if name != AS_IN_RUN and name not in REPLAYABLE:
        raise UserError(f"there is no rule {name} to compare: take {AS_IN_RUN} or one of {', '.join(REPLAYABLE)}")
    if name != AS_IN_RUN:
        return replace(PRESETS[name], quantile=own.quantile, floor=own.floor)
    if own.draws:
        raise UserError("the method of this run draws its tokens at random, and a trace does not hold the draws")
    return own


def updated(traces: Sequence[Trace]) -> list[Trace]:
    """The completions that took part in an update and have a signal."""
    return [trace for trace in traces if trace.signal is not None and trace.tokens.keys() >= set(NEEDED)]


def compare_rules(traces: Sequence[Trace], left: Method, right: Method) -> RuleComparison:
    """Both methods on these completions of one iteration. Raises UserError unless all took part in an update."""
    if not traces or len(updated(traces)) != len(traces):
        raise UserError("no recorded completion here took part in an update, so there is nothing to compare")
    sides = ruled(traces, left), ruled(traces, right)
    pairs = Counter(
        pair for one, other in zip(*sides, strict=True) for pair in zip(one.treatment, other.treatment, strict=True)
    )
    return RuleComparison(*sides, pairs, _quadrants(traces, *sides))


def ruled(traces: Sequence[Trace], method: Method) -> list[Ruled]:
    """Each completion under the method, at the recorded ratios.

    The divergence from the base is left out, since a trace of another method does not hold it. What a method takes from
    the whole iteration (EDGE-GRPO's factor, STARE's share, the loss's denominator) is taken from these completions.
    """
    method = replace(method, kl_certain=0.0, kl_uncertain=0.0)
    entropies = [_column(trace, "entropy") for trace in traces]
    old_logp, ratio = (pad([_column(trace, name) for trace in traces]) for name in ("logp_old", "ratio"))
    inputs, denominator = _inputs(traces, method, entropies, old_logp)
    logp = (old_logp + torch.where(ratio > 0, ratio, 1.0).log()).requires_grad_()
    loss, credit = method_loss(method, logp, inputs, denominator)
    [fall] = torch.autograd.grad(-loss.loss, logp)
    return [_of_row(i, trace, loss, credit, fall) for i, trace in enumerate(traces)]


def _inputs(
    traces: Sequence[Trace], method: Method, entropies: Sequence[Tensor], old_logp: Tensor
) -> tuple[LossInputs, float]:
    """The constants of the loss, and its denominator."""
    signals = [_signal(trace, method) for trace in traces]
    uncertain = [uncertain_tokens(method, signal, e) for signal, e in zip(signals, entropies, strict=True)]
    trained = [trained_tokens(method, u, t.truncated) for u, t in zip(uncertain, traces, strict=True)]
    counted = [not method.leaves_out(trace.truncated) for trace in traces]
    mask = pad([torch.full_like(t, counts) for t, counts in zip(trained, counted, strict=True)])
    tokens = TokenSignals(
        pad([signal.normalize(e) for signal, e in zip(signals, entropies, strict=True)]),
        pad(entropies),
        pad(uncertain),
        entropy_scale(torch.stack([e.mean() for e in entropies]), method.floor),
        _factor(traces, method, entropies),
    )
    advantage = torch.tensor([trace.tokens["advantage"][0] for trace in traces], dtype=torch.float64)
    inputs = LossInputs(
        old_logp=old_logp,
        advantage=advantage,
        tokens=tokens,
        weights=loss_weights(mask, method.loss_average, pad(trained)),
        sampling_logp=pad([_column(trace, "logp_sampling") for trace in traces]),
    )
    counts, longest = torch.stack([t.sum() for t in trained]), max(len(t) for t in trained)
    return inputs, loss_denominator(counts, method.loss_average, longest)


def _factor(traces: Sequence[Trace], method: Method, entropies: Sequence[Tensor]) -> Tensor | None:
    """STARE's factor on the advantage of each token, [B, T]; None for a method without it."""
    if not method.singles_out:
        return None
    logp, advantage = (torch.cat([_column(trace, name) for trace in traces]) for name in ("logp_old", "advantage"))
    factor = advantage_factor(method, logp, advantage, torch.cat(list(entropies)), torch.zeros_like(logp))
    return pad(list(factor.split([len(entropy) for entropy in entropies])))


def _column(trace: Trace, name: str) -> Tensor:
    return torch.tensor(trace.tokens[name], dtype=torch.float64)


def _signal(trace: Trace, method: Method) -> EntropySignal:
    """The recorded signal, with the sign that the method gives its low side.

    The token at the pivot itself may lie above it by the rounding of its recorded entropy.
    """
    if trace.signal is None:
        raise ValueError("a trace without a signal took part in no update")
    return replace(trace.signal, low_side=method.low_side, pivot=trace.signal.pivot + SEVEN_DIGITS / 10.0)


def _of_row(row: int, trace: Trace, loss: PolicyLoss, credit: Credit, fall: Tensor) -> Ruled:
    count = len(trace.tokens["id"])
    advantage = abs(trace.tokens["advantage"][0])
    credits = credit.advantage[row, :count].tolist()
    stops = zip(loss.clipped_low[row].tolist(), loss.clipped_high[row].tolist(), loss.valid[row].tolist(), strict=True)
    treatment = []
    gradient = fall[row, :count].tolist()
    for value, pull, (low, high, counts) in zip(credits, gradient, stops, strict=False):
        if not counts or value == 0.0:
            treatment.append("left out")
        elif (low or high) and pull == 0.0:  # CISPO's bound limits a token's weight and stops no gradient.
            treatment.append("stopped low" if low else "stopped high")
        else:
            treatment.append(_compared(abs(value), advantage))
    return Ruled(
        credits, credit.lower[row, :count].tolist(), credit.upper[row, :count].tolist(), gradient,
        treatment,
    )  # fmt: skip


def _compared(credit: float, advantage: float) -> str:
    if abs(credit - advantage) <= SEVEN_DIGITS * advantage:
        return "kept"
    return "amplified" if credit > advantage else "suppressed"


def _quadrants(
    traces: Sequence[Trace], left: Sequence[Ruled], right: Sequence[Ruled]
) -> dict[tuple[bool, bool], Quadrant]:
    """The four quadrants of entropy times sign of the advantage. Uncertain: above the pivot of the recorded signal."""
    counts: Counter[tuple[bool, bool]] = Counter()
    weights: list[dict[tuple[bool, bool], float]] = [dict.fromkeys(PLACES, 0.0) for _ in range(2)]
    for i, trace in enumerate(traces):
        advantage = trace.tokens["advantage"][0]
        if advantage == 0.0:
            continue
        above = _signal(trace, Method()).above(_column(trace, "entropy")).tolist()
        for side, found in zip((left[i], right[i]), weights, strict=True):
            for uncertain, gradient in zip(above, side.gradient, strict=True):
                found[uncertain, advantage > 0] += abs(gradient)
        counts.update((uncertain, advantage > 0) for uncertain in above)
    sums = [sum(found.values()) or 1.0 for found in weights]
    return {
        place: Quadrant(counts[place], *(found[place] / total for found, total in zip(weights, sums, strict=True)))
        for place in PLACES
    }
