"""The optimiser steps of one iteration. The gradient of a step does not depend on its micro-batches.

Axes: B completions of a micro-batch, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import Credit, PolicyLoss, loss_denominator, method_loss
from hapo_lite.model.policy import Policy
from hapo_lite.records import Experience, TokenOutcome
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.skipped import SkippedStep
from hapo_lite.train.batching import Parts, Plan, padded_tokens
from hapo_lite.train.observer import Observer
from hapo_lite.train.optimizer import Learner, loss_scale, take_step
from hapo_lite.train.resources import Resources
from hapo_lite.train.scoring import logprobs


class Gradients(NamedTuple):
    """loss: of this process's micro-batches, scalar. outcomes: by completion, what the step does to its tokens."""

    loss: Tensor
    outcomes: dict[int, TokenOutcome]


@dataclass
class Updated:
    """What the steps of an iteration did. outcomes: by completion, of the steps that were taken.

    skipped: steps that were not; skipped_in_a_row: of them, those up to the last step, earlier iterations included.
    """

    outcomes: dict[int, TokenOutcome] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    learning_rate: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def taken(self) -> int:
        return len(self.losses)

    @property
    def metrics(self) -> dict[str, float]:
        found = {"update/skipped": self.skipped, "update/learning_rate": self.learning_rate}
        if self.losses:
            found["update/loss"] = sum(self.losses) / len(self.losses)
            found["update/grad_norm"] = sum(self.norms) / len(self.norms)
        return found


@dataclass(frozen=True)
class Update:
    """The stage that changes the weights."""

    policy: Policy
    method: Method
    temperature: float
    max_grad_norm: float
    learner: Learner
    resources: Resources

    def run(self, experience: Experience, plan: Plan, state: TrainState, observer: Observer) -> Updated:
        """Take every step of `plan`; a step whose numbers are not finite is skipped and handed to the observer."""
        progress, processes = self.resources.progress, self.resources.processes
        updated = Updated(skipped_in_a_row=state.skipped_in_a_row)
        lengths = experience.sequence_lengths
        trained = torch.stack([t.sum() for t in experience.trained(self.method)])
        share = [batch for part in plan.updates for batch in processes.rank_share(part)]
        progress.count(len(share), "micro-batches", padded_tokens(share, lengths))
        for number, (members, batches) in enumerate(zip(plan.members, plan.updates, strict=True), 1):
            denominator = loss_denominator(trained[members], self.method.loss_average)
            [batches], gradients = self.resources.oom.fit(
                "update",
                [batches],
                lengths,
                partial(self._attempt, experience, denominator),
                weights_unchanged=number == 1,
            )
            scale = loss_scale(self.learner.optimizer)
            problem = self._step(gradients, updated)
            if problem is not None:
                order = sorted(members)
                step = SkippedStep(state.iteration, number, problem, experience, batches, denominator, scale)
                observer.on_skip(step.only(order))
        self.learner.optimizer.zero_grad(set_to_none=True)
        updated.outcomes = processes.gather(updated.outcomes)
        return updated

    def _step(self, gradients: Gradients, updated: Updated) -> str | None:
        """Step the optimiser and note it in `updated`. Returns why the step was not taken; None if it was."""
        accelerator, learner = self.resources.accelerator, self.learner
        loss = float(accelerator.reduce(gradients.loss, "sum"))
        updated.learning_rate = learner.scheduler.get_last_lr()[0]
        norm, problem = take_step(accelerator, learner.optimizer, learner.parameters, loss, self.max_grad_norm)
        if problem is not None:
            updated.skipped += 1
            updated.skipped_in_a_row += 1
            return problem
        learner.scheduler.step()
        updated.skipped_in_a_row = 0
        updated.outcomes |= gradients.outcomes
        updated.losses.append(loss)
        updated.norms.append(norm)
        return None

    def _attempt(self, experience: Experience, denominator: float, parts: Parts) -> Gradients:
        processes = self.resources.processes
        [batches] = parts
        return self.gradients(
            experience, processes.rank_share(batches), denominator, padding=processes.padding(batches)
        )

    def gradients(
        self,
        experience: Experience,
        batches: Sequence[Sequence[int]],
        denominator: float,
        padding: Sequence[Sequence[int]] = (),
    ) -> Gradients:
        """Forward and backward of a step's micro-batches. The gradients are summed over processes, the loss is not.

        denominator: of the whole step, `loss_denominator`. padding: dummy micro-batches that keep collectives in step.
        Raises OutOfMemory, in all processes, if memory runs out in one; called again, it begins from nothing.
        """
        outcomes: dict[int, TokenOutcome] = {}
        self.learner.optimizer.zero_grad(set_to_none=True)
        accelerator, processes = self.resources.accelerator, self.resources.processes
        loss = torch.zeros((), device=accelerator.device)
        lengths = experience.sequence_lengths
        with self.resources.oom.together(lockstep=processes.sharded):
            for batch in batches:
                part = self.micro_batch(experience.select(batch), denominator)
                accelerator.backward(part.loss)
                loss += part.loss.detach()
                outcomes |= {i: part.outcomes[row] for row, i in enumerate(batch)}
                self.resources.progress.advance(1, padded_tokens([batch], lengths))
            for batch in padding:
                logp, _ = logprobs(self.policy, experience.select(batch).completions, self.temperature)
                accelerator.backward(0.0 * logp.sum())
        processes.share_gradients(self.learner.parameters)
        return Gradients(loss, outcomes)

    def micro_batch(self, batch: Experience, denominator: float) -> Gradients:
        """The loss of one micro-batch, with its graph, and what it does to each token of its rows."""
        logp, _ = logprobs(self.policy, batch.completions, self.temperature)
        inputs = batch.padded(self.method, logp.device)
        loss, credit = method_loss(self.method, logp, inputs, denominator)
        return Gradients(loss.loss, outcomes_of(batch, logp, loss, credit))


def outcomes_of(batch: Experience, logp: Tensor, loss: PolicyLoss, credit: Credit) -> dict[int, TokenOutcome]:
    """By row of `batch`, what its loss does to each token; on the CPU. logp: [B, T]."""
    by_token = {
        "logp": logp,
        "ratio": loss.ratio,
        "credit": credit.advantage,
        "lower": credit.lower,
        "upper": credit.upper,
        "clipped_low": loss.clipped_low,
        "clipped_high": loss.clipped_high,
    }
    if loss.kl_base is not None:
        by_token["kl_base"] = loss.kl_base
    by_token = {name: rows.detach().cpu() for name, rows in by_token.items()}
    return {
        row: TokenOutcome(
            float(batch.advantage[row]),
            batch.old_logp[row],
            batch.entropy[row],
            batch.h[row],
            batch.uncertain[row],
            **{name: rows[row, : batch.completions[row].length].clone() for name, rows in by_token.items()},
        )
        for row in range(len(batch))
    }
