"""The optimiser steps of one iteration. The gradient of a step does not depend on its micro-batches.

Axes: B completions of a micro-batch, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import PolicyLoss, loss_denominator, method_loss
from hapo_lite.algo.surrogate import Credit
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import RolloutSettings
from hapo_lite.records import Experience, TokenOutcome, pad
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.skipped import SkippedStep
from hapo_lite.train.batching import Parts, Plan, padded_tokens
from hapo_lite.train.observer import Observer
from hapo_lite.train.optimizer import Learner, advance, loss_scale
from hapo_lite.train.resources import Resources
from hapo_lite.train.scoring import logprobs


@dataclass(frozen=True)
class Passes:
    """The forward passes of an optimiser step, by micro-batch. lengths: tokens of each sequence, by member.

    policy: whose passes they are. loss_of: a micro-batch's part of the loss, a scalar with its graph. idle: a scalar of
    a dummy micro-batch, for a process that has no more of its own while a split base takes all processes.
    """

    policy: Policy
    loss_of: Callable[[list[int]], Tensor]
    idle: Callable[[list[int]], Tensor]
    lengths: Sequence[int]


def sum_gradients(batches: list[list[int]], passes: Passes, learner: Learner, resources: Resources) -> Tensor:
    """Forward and backward of the step's micro-batches, of which this process does its share.

    Returns the loss of this process's micro-batches, a scalar. The gradients are summed over processes, the loss is
    not. Each call starts with the gradients cleared. Raises OutOfMemory in all processes if memory runs out in one.
    """
    accelerator, processes = resources.accelerator, resources.processes
    learner.optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=accelerator.device)
    unpacked = passes.policy.unpacked(exact=True, in_update=True)
    with unpacked, resources.oom.together(lockstep=processes.sharded):
        for batch in processes.rank_share(batches):
            part = passes.loss_of(batch)
            accelerator.backward(part)
            loss += part.detach()
            resources.progress.advance(1, padded_tokens([batch], passes.lengths))
        for batch in processes.padding(batches):
            accelerator.backward(0.0 * passes.idle(batch))
    processes.share_gradients(learner.parameters)
    return loss


class LossAndOutcomes(NamedTuple):
    """loss: scalar, over this process's micro-batches. outcomes: the step's effect on each completion, by its
    index in the iteration."""

    loss: Tensor
    outcomes: dict[int, TokenOutcome]


@dataclass
class Updated:
    """The result of an iteration's steps. outcomes: of the steps that were taken, by place of the completion.

    losses, norms: one for each step taken. skipped: number of steps that were skipped. skipped_in_a_row: number of
    skipped steps since the last one that was taken, earlier iterations included.
    """

    outcomes: dict[int, TokenOutcome] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    learning_rate: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def taken(self) -> int:
        """Number of steps that were taken."""
        return len(self.losses)

    @property
    def metrics(self) -> dict[str, float]:
        """The step metrics of metrics.jsonl."""
        metrics = {"update/skipped": self.skipped, "update/learning_rate": self.learning_rate}
        if self.losses:
            metrics["update/loss"] = sum(self.losses) / len(self.losses)
            metrics["update/grad_norm"] = sum(self.norms) / len(self.norms)
        return metrics

    def add_taken(self, loss: float, norm: float, outcomes: dict[int, TokenOutcome]) -> None:
        """Count a step that was taken."""
        self.skipped_in_a_row = 0
        self.losses.append(loss)
        self.norms.append(norm)
        self.outcomes |= outcomes

    def add_skipped(self) -> None:
        """Count a step that was skipped."""
        self.skipped += 1
        self.skipped_in_a_row += 1


@dataclass(frozen=True)
class Update:
    """The stage that changes the weights."""

    policy: Policy
    method: Method
    rollout: RolloutSettings
    max_grad_norm: float
    learner: Learner
    resources: Resources

    def run(self, experience: Experience, plan: Plan, state: TrainState, observer: Observer) -> Updated:
        """Take every step of `plan`. A step whose numbers are not finite is skipped and reported to the observer.

        `observer.before_update` is called when the first step has its gradient. Raises UserError if memory does not
        suffice for one sequence at a time.
        """
        progress, processes, learner = self.resources.progress, self.resources.processes, self.learner
        updated = Updated(skipped_in_a_row=state.skipped_in_a_row)
        lengths = experience.sequence_lengths
        trained = torch.stack([t.sum() for t in experience.trained(self.method)])
        share = [batch for part in plan.updates for batch in processes.rank_share(part)]
        progress.count(len(share), "micro-batches", padded_tokens(share, lengths))
        for number, (members, batches) in enumerate(zip(plan.members, plan.updates, strict=True), 1):
            denominator = self.denominator(trained[members])
            parts, gradients = self.resources.oom.fit(
                "update",
                [batches],
                lengths,
                partial(self._attempt, experience, denominator),
                weights_unchanged=number == 1,
            )
            scale = loss_scale(learner.optimizer)
            updated.learning_rate = learner.scheduler.get_last_lr()[0]
            loss = float(self.resources.accelerator.reduce(gradients.loss, "sum"))
            if number == 1:
                observer.before_update()
            norm, problem = advance(self.resources.accelerator, learner, loss, self.max_grad_norm)
            if problem is None:
                updated.add_taken(loss, norm, gradients.outcomes)
                continue
            updated.add_skipped()
            step = SkippedStep(state.iteration, number, problem, experience, parts[0], denominator, scale)
            observer.on_skip(step.only(sorted(members)))
        learner.optimizer.zero_grad(set_to_none=True)
        updated.outcomes = processes.gather(updated.outcomes)
        return updated

    def denominator(self, trained_counts: Tensor) -> float:
        """`loss_denominator` of a step. trained_counts: trained tokens of each of its completions."""
        return loss_denominator(trained_counts, self.method.loss_average, self.rollout.max_new_tokens)

    def _attempt(self, experience: Experience, denominator: float, parts: Parts) -> LossAndOutcomes:
        [batches] = parts
        return self.gradients(experience, batches, denominator)

    def gradients(self, experience: Experience, batches: list[list[int]], denominator: float) -> LossAndOutcomes:
        """`sum_gradients` of a step's micro-batches, with the outcomes of this process's.

        denominator: that of the whole step.
        """
        outcomes: dict[int, TokenOutcome] = {}

        def loss_of(batch: list[int]) -> Tensor:
            part = self.micro_batch(experience.select(batch), denominator)
            outcomes.update({i: part.outcomes[row] for row, i in enumerate(batch)})
            return part.loss

        def idle(batch: list[int]) -> Tensor:
            return logprobs(self.policy, experience.select(batch).completions, self.rollout.temperature)[0].sum()

        passes = Passes(self.policy, loss_of, idle, experience.sequence_lengths)
        return LossAndOutcomes(sum_gradients(batches, passes, self.learner, self.resources), outcomes)

    def micro_batch(self, batch: Experience, denominator: float) -> LossAndOutcomes:
        """The loss of one micro-batch, with its graph, and its effect on each token. The outcomes are by row."""
        logp, _ = logprobs(self.policy, batch.completions, self.rollout.temperature, batch.kept)
        inputs = batch.padded(self.method, logp.device)
        loss, credit = method_loss(self.method, logp, inputs, denominator)
        return LossAndOutcomes(loss.loss, outcomes_of(batch, self.method, logp, loss, credit))


def outcomes_of(
    batch: Experience, method: Method, logp: Tensor, loss: PolicyLoss, credit: Credit
) -> dict[int, TokenOutcome]:
    """The loss's effect on each token, on the CPU, by row of `batch`. logp: [B, T].

    The ratio is measured on completions that the loss leaves out too.
    """
    old_logp, kept, advantage = pad(batch.old_logp, logp.device), None, credit.advantage
    if batch.kept is not None:
        kept = pad(batch.kept, logp.device)
        logp, advantage = torch.where(kept, logp, old_logp), torch.where(kept, advantage, 0.0)
    trained = batch.trained(method)
    by_token = {
        "logp": logp,
        "ratio": (logp.detach() - old_logp).exp(),
        "credit": advantage,
        "lower": credit.lower,
        "upper": credit.upper,
        "clipped_low": loss.clipped_low,
        "clipped_high": loss.clipped_high,
    }
    if loss.measure is not None:
        by_token["measure"] = loss.measure
    if loss.kl_base is not None:
        by_token["kl_base"] = loss.kl_base
    # Stacked, they are one copy from a GPU.
    rows_of = torch.stack([rows.detach().to(logp.dtype) for rows in by_token.values()]).cpu()
    by_token = {name: rows.to(was.dtype) for (name, was), rows in zip(by_token.items(), rows_of, strict=True)}
    return {
        row: TokenOutcome(
            float(batch.advantage[row]),
            batch.old_logp[row],
            batch.entropy[row],
            batch.h[row],
            batch.uncertain[row],
            trained=trained[row] if batch.factor is None else trained[row] & (batch.factor[row] != 0.0),
            computed=None if batch.kept is None else batch.kept[row],
            **{
                name: rows[row, : batch.completions[row].length].clone()
                for name, rows in by_token.items()
                if name != "kl_base" or not method.leaves_out(batch.completions[row].truncated)
            },
        )
        for row in range(len(batch))
    }
