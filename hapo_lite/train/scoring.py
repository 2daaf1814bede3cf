"""Turns graded completions into the iteration's experience: advantages, the old policy on every token, the signal.

Axes: B completions, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hapo_lite.algo.advantage import decoupled_advantage, entropy_scale, group_advantage
from hapo_lite.algo.methods import Method
from hapo_lite.algo.tokens import fit_signal, uncertain_tokens
from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import RolloutSettings
from hapo_lite.records import Completion, Experience, Graded, Sequences, pad
from hapo_lite.rollout.draws import DrawKey
from hapo_lite.train.batching import Parts, Plan, padded_tokens
from hapo_lite.train.finite import check_tokens
from hapo_lite.train.resources import Resources
from hapo_lite.train.selection import Draws


class TokenScores(NamedTuple):
    """Log-probability and entropy (nats) of every completion token: [T] for each completion, on the CPU."""

    logp: list[Tensor]
    entropy: list[Tensor]


class Scored(NamedTuple):
    """plan: its micro-batches are those that fitted into memory, and the updates use them again."""

    plan: Plan
    experience: Experience


@dataclass(frozen=True)
class Scoring:
    """The stage between rollout and update: forward passes of the policy and, for some methods, of its base."""

    policy: Policy
    method: Method
    rollout: RolloutSettings
    resources: Resources

    def score(self, graded: Graded, advantage: Tensor, plan: Plan, key: DrawKey) -> Scored:
        """Score in the micro-batches of `plan`, and in smaller ones if memory runs out.

        key: what the random numbers depend on with which a method singles out tokens.

        The updates use the same micro-batches: equal shapes give a ratio of 1 to the last bit before the first update.
        Raises NotFinite for a log-probability or entropy that is nan or inf, and UserError if no signal can be fitted.
        """

        def attempt(parts: Parts) -> Experience:
            return self._experience(graded, advantage, plan.cut(parts), Draws.of(self.method, key, graded.completions))

        parts, experience = self.resources.oom.fit(
            "scoring", plan.parts, graded.sequence_lengths, attempt, weights_unchanged=True
        )
        return Scored(plan.cut(parts), experience)

    def _experience(self, graded: Graded, advantage: Tensor, plan: Plan, draws: Draws) -> Experience:
        method, completions = self.method, graded.completions
        kept = draws.kept(method)
        if self.rollout.old_logprobs == "sampled":
            old = TokenScores([c.base_logp for c in completions], [c.entropy for c in completions])
        else:
            old = self._forward(graded, plan, kept)
        reference_logp = None
        if method.needs_base:
            with self.policy.base_alone():
                reference_logp = self._forward(graded, plan).logp
        check_tokens("log-probability", old.logp, completions)
        check_tokens("entropy", old.entropy, completions)
        try:
            signal = fit_signal(method, torch.cat(old.entropy))
        except ValueError as error:
            raise UserError(f"no signal can be fitted: {error}") from error
        return Experience(
            completions,
            graded.scores,
            advantage,
            old.logp,
            old.entropy,
            signal,
            h=[signal.normalize(e) for e in old.entropy],
            uncertain=[uncertain_tokens(method, signal, e) for e in old.entropy],
            scale=entropy_scale(torch.stack([e.mean() for e in old.entropy]), method.floor),
            reference_logp=reference_logp,
            factor=draws.factor(method, completions, advantage, old.logp, old.entropy),
            drawn=draws.drawn(method),
            kept=kept,
        )

    @torch.no_grad()
    def _forward(self, graded: Graded, plan: Plan, apart: list[Tensor] | None = None) -> TokenScores:
        """One forward pass over every completion. Each process does its share, and gets the results of all.

        apart: the tokens that the updates will compute, bool [T] each; None: all. The head computes them apart from the
        others, in the shapes of the updates, so that every ratio is 1 to the last bit before the first one.
        """
        processes, oom, progress = self.resources.processes, self.resources.oom, self.resources.progress
        found: dict[int, tuple[Tensor, Tensor]] = {}
        batches = [b for part in plan.parts for b in (*processes.rank_share(part), *processes.padding(part))]
        lengths = graded.sequence_lengths
        progress.count(len(batches), "micro-batches", padded_tokens(batches, lengths))
        with self.policy.unpacked(exact=True), oom.together(lockstep=processes.sharded):
            for batch in batches:
                completions = graded.select(batch).completions
                # Stacked, they are one copy from a GPU.
                own = None if apart is None else [apart[i] for i in batch]
                logp, entropy = torch.stack(self._logprobs(completions, own)).cpu()
                progress.advance(1, padded_tokens([batch], lengths))
                for row, i in enumerate(batch):
                    length = completions[row].length
                    found[i] = logp[row, :length].clone(), entropy[row, :length].clone()
        found = processes.gather(found)
        rows = [found[i] for i in range(len(graded))]
        return TokenScores([logp for logp, _ in rows], [entropy for _, entropy in rows])

    def _logprobs(self, completions: Sequence[Completion], apart: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every token, [B, T] each. apart: as in `_forward`, for these completions."""
        if apart is None:
            return logprobs(self.policy, completions, self.rollout.temperature)
        batch = Sequences.of(completions, self.policy.device)
        tokens = computed_tokens(apart, self.policy.device)
        hidden = self.policy.head_states(batch)
        parts = [
            self.policy.masked_logprobs(hidden, batch.only(mask), self.rollout.temperature)
            for mask in (tokens, ~tokens)
        ]
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]


def logprobs(
    policy: Policy, completions: Sequence[Completion], temperature: float, kept: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats) of every completion token, [B, T] each; the first is differentiable.

    kept: bool [T] each, the tokens that are computed; both are 0 for the others. None: all.
    """
    batch = Sequences.of(completions, policy.device)
    if kept is not None:
        batch = batch.only(computed_tokens(kept, policy.device))
    return policy.completion_logprobs(batch, temperature)


def computed_tokens(kept: list[Tensor], device: torch.device | str) -> Tensor:
    """The tokens that a micro-batch computes if it keeps these, bool [B, T] on `device`. kept: bool [T] each.

    A micro-batch that keeps none computes one token, so that its loss has a graph.
    """
    if not any(bool(row.any()) for row in kept):
        kept = [torch.arange(len(kept[0])) == 0, *kept[1:]]
    return pad(kept, device)


def advantages(graded: Graded, method: Method, normalised: Mapping[str, float] | None = None) -> Tensor:
    """Each completion's advantage within its group: [B], fp32, computed in fp64.

    A completion that the method leaves out for being cut off counts in its group, and has advantage 0 itself.
    normalised: weights of the named rewards that are normalised apart; without them it is the whole reward.
    """
    lengths = torch.tensor([c.length for c in graded.completions])
    groups = torch.tensor([c.prompt.index for c in graded.completions])
    if normalised:
        rewards = torch.stack([graded.rewards_of(name) for name in normalised])
        weights = torch.tensor(list(normalised.values()), dtype=torch.float64)
        advantage = decoupled_advantage(rewards, weights, lengths, groups, method.advantage_level)
    else:
        advantage = group_advantage(graded.rewards, lengths, groups, method.advantage_level, method.scale)
    left_out = torch.tensor([method.leaves_out(c.truncated) for c in graded.completions])
    return advantage.masked_fill(left_out, 0.0).float()
