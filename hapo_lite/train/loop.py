"""The training loop: rollout, score, advantage, update, log, evaluate, save.

Axes: P prompts and G completions per prompt make an iteration; B completions of a micro-batch, T completion tokens.
Every process holds the whole iteration's completions, which are small, and does its share of the forward passes, so the
signal, the groups and the denominator are global by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hapo_lite.algo.advantage import entropy_scale, group_advantage
from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import loss_denominator, loss_weights, method_loss
from hapo_lite.algo.tokens import TokenSignals, fit_signal, uncertain_tokens
from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.model.sharding import sharded_modules
from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion, EncodedPrompt, Scored, Sequences, TokenOutcome, pad
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.skipped import SkippedStep
from hapo_lite.runs.trace import Trace
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.batching import Parts, Plan, make_plan, micro_batches, padded_tokens, sequence_lengths
from hapo_lite.train.collect import Collected, Collector
from hapo_lite.train.finite import NotFinite, check_rewards, check_tokens
from hapo_lite.train.metrics import (
    Stopwatch,
    entropy_metrics,
    gap_metrics,
    peak_memory_mb,
    rollout_metrics,
    update_metrics,
)
from hapo_lite.train.optimizer import loss_scale, make_optimizer, make_scheduler, take_step
from hapo_lite.train.processes import Processes
from hapo_lite.train.traces import choose_traced, make_trace


@dataclass(frozen=True)
class Evaluation:
    """avg@n on the held-out prompts, and traces of a few of them."""

    metrics: dict[str, Any]
    traces: list[Trace]


class Loop:
    """One run's moving parts. `step` does an iteration and returns the state after it.

    keep: given each step that is skipped, before anything else is done.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        collector: Collector,
        stream: PromptStream,
        held_out: Sequence[EncodedPrompt],
        accelerator: Accelerator,
        keep: Callable[[SkippedStep], None] = lambda step: None,
    ) -> None:
        self.recipe, self.policy, self.collector = recipe, policy, collector
        self.progress = collector.progress
        self.stream, self.held_out, self.accelerator = stream, held_out, accelerator
        self.keep, self.shortage = keep, collector.shortage
        self.processes = Processes(accelerator, sharded=bool(sharded_modules(policy)))
        self.parameters = list(policy.trainable().values())
        self.optimizer = accelerator.prepare(make_optimizer(recipe.training, self.parameters))
        self.scheduler = make_scheduler(recipe.training, self.optimizer.optimizer)

    def step(
        self, state: TrainState, commit: Callable[[], None] = lambda: None
    ) -> tuple[TrainState, dict[str, float], list[Trace]]:
        """One iteration. `commit` is called when the weights are about to change: until then it can be given up."""
        watch, shortages = Stopwatch(), self.shortage.count
        iteration = state.iteration + 1
        collected = self.rollout(state, iteration)
        watch.lap("rollout")
        metrics = rollout_metrics(collected)
        state = replace(state, iteration=iteration, cursor=state.cursor + collected.prompts_used)
        state = replace(state, tokens=state.tokens + collected.tokens_sampled)
        traces: list[Trace] = []
        if collected.completions:
            state, learned, traces = self.learn(state, collected, commit, watch)
            metrics |= learned
        else:
            commit()
        seconds = {**watch.seconds, **collected.seconds}
        metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
        metrics["tokens_per_second/sampled"] = collected.tokens_sampled / max(collected.seconds["rollout"], 1e-9)
        metrics["memory/peak_mb"] = peak_memory_mb(self.accelerator.device)
        metrics["memory/shortages"] = self.shortage.count - shortages
        return state, {"iteration": iteration, "tokens": state.tokens, "updates": state.updates, **metrics}, traces

    def learn(
        self, state: TrainState, collected: Collected, commit: Callable[[], None], watch: Stopwatch
    ) -> tuple[TrainState, dict[str, float], list[Trace]]:
        """Score and update. What is found not to be finite before the first update costs all of the iteration's."""
        completions = collected.completions
        traced = choose_traced(collected, self.recipe.logging.traces_per_iteration)
        try:
            check_rewards(collected.scores, completions)
            advantage = advantages(collected, self.recipe.method)
            plan = self.plan(completions, advantage, traced, state.iteration)
            self.progress.enter("scoring")
            plan, scored = self.score_what_fits(completions, plan)
        except NotFinite as found:
            commit()
            budget = self.shortage.budget(self.recipe.training.micro_batch_tokens)
            batches = micro_batches(range(len(completions)), sequence_lengths(completions), budget)
            self.keep(SkippedStep(state.iteration, 0, str(found), completions, rewards(collected), None, None, batches))
            missed = {"update/skipped": self.recipe.training.updates_per_iteration}
            return replace(state, skipped_in_a_row=state.skipped_in_a_row + 1), missed, []
        watch.lap("score")
        commit()
        self.progress.enter("update")
        outcomes, update, in_a_row = self.update(collected, advantage, scored, plan, state)
        watch.lap("update")
        metrics = entropy_metrics(scored.entropy, collected.scores, scored.signal, scored.uncertain)
        metrics |= update_metrics(list(outcomes.values()), self.recipe.method)
        metrics |= gap_metrics(completions, scored.old_logp) | update
        sampled_with = state.signal if self.recipe.method.adaptive_temperature else None
        traces = [
            make_trace(
                self.policy,
                "train",
                state.iteration,
                completions[i],
                collected.scores[i],
                sampled_with,
                scored.signal,
                outcomes.get(i),
            )
            for i in traced
        ]
        taken = len(plan.updates) - int(update["update/skipped"])
        state = replace(state, signal=scored.signal, updates=state.updates + taken, skipped_in_a_row=in_a_row)
        return state, metrics, traces

    def rollout(self, state: TrainState, iteration: int) -> Collected:
        """P graded groups, sampled with the previous iteration's signal."""
        settings, method = self.recipe.rollout, self.recipe.method
        signal = state.signal if method.adaptive_temperature else None
        return self.collector.collect(
            self.stream,
            state.cursor,
            groups=settings.prompts_per_iteration,
            samples=settings.completions_per_prompt,
            processor=AdaptiveTemperature(signal, settings.temperature, method.tau, settings.top_p, settings.top_k),
            seed=self.recipe.seed,
            iteration=iteration,
            token_budget=self.recipe.token_budget if settings.dynamic_sampling else None,
        )

    def plan(self, completions: Sequence[Completion], advantage: Tensor, traced: Sequence[int], iteration: int) -> Plan:
        """Deal completions to steps, and steps to micro-batches. Scoring uses the same micro-batches as the update.

        So the same products are computed on the same shapes, and ratio = 1 to the last bit before the first update.
        """
        active = set(advantage.nonzero().squeeze(1).tolist()) | set(traced)
        if self.recipe.method.needs_base:
            active = set(range(len(completions)))  # the divergence from the base has a gradient everywhere
        budget = self.shortage.budget(self.recipe.training.micro_batch_tokens)
        return make_plan(self.recipe, sequence_lengths(completions), active, iteration, budget)

    def score_what_fits(self, completions: Sequence[Completion], plan: Plan) -> tuple[Plan, Scored]:
        """`score`, and the plan with the micro-batches that fitted into memory, for the update to use the same."""
        parts, scored = self.shortage.fit(
            "scoring",
            plan.parts,
            sequence_lengths(completions),
            lambda parts: self.score(completions, plan.cut(parts)),
            whole=True,
        )
        return plan.cut(parts), scored

    def score(self, completions: Sequence[Completion], plan: Plan) -> Scored:
        """The old policy's log-probabilities and entropies, and the signal fitted on all tokens of the iteration."""
        method = self.recipe.method
        if self.recipe.rollout.old_logprobs == "sampled":
            old_logp, entropy = [c.base_logp for c in completions], [c.entropy for c in completions]
        else:
            old_logp, entropy = self._forward_all(completions, plan)
        base_logp = None
        if method.needs_base:
            with self.policy.base_alone():
                base_logp, _ = self._forward_all(completions, plan)
        check_tokens("log-probability", old_logp, completions)
        check_tokens("entropy", entropy, completions)
        try:
            signal = fit_signal(method, torch.cat(entropy))
        except ValueError as error:
            raise UserError(f"no signal can be fitted: {error}") from error
        return Scored(
            old_logp,
            entropy,
            signal,
            h=[signal.normalize(e) for e in entropy],
            uncertain=[uncertain_tokens(method, signal, e) for e in entropy],
            scale=entropy_scale(torch.stack([e.mean() for e in entropy]), method.floor),
            base_logp=base_logp,
        )

    @torch.no_grad()
    def _forward_all(self, completions: Sequence[Completion], plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probabilities and entropies of every completion, in order: two lists of [T], on the CPU."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        batches = [b for part in plan.parts for b in (*self.processes.mine(part), *self.processes.idle(part))]
        lengths = sequence_lengths(completions)
        self.progress.count(len(batches), "micro-batches", padded_tokens(batches, lengths))
        with self.policy.unpacked(exact=True), self.shortage.together(lockstep=self.processes.sharded):
            for batch in batches:
                logp, entropy = (t.cpu() for t in self._logprobs([completions[i] for i in batch]))
                self.progress.advance(1, padded_tokens([batch], lengths))
                for row, i in enumerate(batch):
                    length = completions[i].length
                    found[i] = logp[row, :length].clone(), entropy[row, :length].clone()
        found = self.processes.everyones(found)
        return [found[i][0] for i in range(len(completions))], [found[i][1] for i in range(len(completions))]

    def update(
        self, collected: Collected, advantage: Tensor, scored: Scored, plan: Plan, state: TrainState
    ) -> tuple[dict[int, TokenOutcome], dict[str, float], int]:
        """The optimiser steps of one iteration. The gradient of a step does not depend on its micro-batches.

        Returns what each step that was taken did to its completions, metrics, and how many steps in a row, up to now,
        were skipped.
        """
        completions, outcomes, in_a_row = collected.completions, {}, state.skipped_in_a_row
        losses, norms, rate, skipped = [], [], 0.0, 0
        lengths = sequence_lengths(completions)
        trained = torch.stack([t.sum() for t in scored.trained(self.recipe.method)])
        mine = [batch for part in plan.updates for batch in self.processes.mine(part)]
        self.progress.count(len(mine), "micro-batches", padded_tokens(mine, lengths))
        for number, (members, batches) in enumerate(zip(plan.members, plan.updates, strict=True), 1):
            denominator = loss_denominator(trained[members], self.recipe.method.loss_average)

            def attempt(parts: Parts, denominator: float = denominator) -> tuple[Tensor, dict[int, TokenOutcome]]:
                mine, idle = self.processes.mine(parts[0]), self.processes.idle(parts[0])
                return self.gradients(mine, completions, advantage, scored, denominator, idle)

            [batches], (loss, seen) = self.shortage.fit("update", [batches], lengths, attempt, whole=number == 1)
            loss = float(self.accelerator.reduce(loss, "sum"))
            rate, scale = self.scheduler.get_last_lr()[0], loss_scale(self.optimizer)
            norm, problem = take_step(
                self.accelerator, self.optimizer, self.parameters, loss, self.recipe.training.max_grad_norm
            )
            if problem is not None:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                known = rewards(collected), advantage, scored
                step = SkippedStep(state.iteration, number, problem, completions, *known, batches, denominator, scale)
                self.keep(step.only(sorted(members)))
                continue
            in_a_row = 0
            self.scheduler.step()
            outcomes |= seen
            losses.append(loss)
            norms.append(norm)
        self.optimizer.zero_grad(set_to_none=True)
        metrics = {"update/skipped": skipped, "update/learning_rate": rate}
        if losses:
            metrics |= {"update/loss": sum(losses) / len(losses), "update/grad_norm": sum(norms) / len(norms)}
        return self.processes.everyones(outcomes), metrics, in_a_row

    def gradients(
        self,
        batches: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        advantage: Tensor,
        scored: Scored,
        denominator: float,
        idle: Sequence[Sequence[int]] = (),
    ) -> tuple[Tensor, dict[int, TokenOutcome]]:
        """Forward and backward of a step's micro-batches; the gradients are summed over processes. The loss is not.

        idle: micro-batches that are run for the other processes' sake, without a gradient.

        Raises OutOfMemory, in all processes, if one is short of it; called again, it begins from nothing.
        """
        outcomes: dict[int, TokenOutcome] = {}
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.accelerator.device)
        lengths = sequence_lengths(completions)
        with self.shortage.together(lockstep=self.processes.sharded):
            for batch in batches:
                part, seen = self._micro_batch(batch, completions, advantage, scored, denominator)
                self.accelerator.backward(part)
                loss += part.detach()
                outcomes |= seen
                self.progress.advance(1, padded_tokens([batch], lengths))
            for batch in idle:
                logp, _ = self._logprobs([completions[i] for i in batch])
                self.accelerator.backward(0.0 * logp.sum())
        self.processes.share_gradients(self.parameters)
        return loss, outcomes

    def _micro_batch(
        self,
        batch: Sequence[int],
        completions: Sequence[Completion],
        advantage: Tensor,
        scored: Scored,
        denominator: float,
    ) -> tuple[Tensor, dict[int, TokenOutcome]]:
        """The loss of one micro-batch, and what it does to each of its tokens."""
        device, method = self.accelerator.device, self.recipe.method

        def padded(rows: Sequence[Tensor]) -> Tensor:
            return pad([rows[i] for i in batch], device)

        logp, _ = self._logprobs([completions[i] for i in batch])
        mask = torch.arange(logp.shape[1])[None] < torch.tensor([completions[i].length for i in batch])[:, None]
        loss, credit = method_loss(
            method,
            logp,
            padded(scored.old_logp),
            advantage[batch].to(device),
            TokenSignals(
                padded(scored.h), padded(scored.entropy), padded(scored.uncertain), scored.scale[batch].to(device)
            ),
            loss_weights(mask.to(device), method.loss_average, padded(scored.trained(method))),
            denominator,
            sampling_logp=padded([c.sampling_logp for c in completions]),
            base_logp=None if scored.base_logp is None else padded(scored.base_logp),
        )
        found = {
            "logp": logp,
            "ratio": loss.ratio,
            "credit": credit.advantage,
            "lower": credit.lower,
            "upper": credit.upper,
            "clipped_low": loss.clipped_low,
            "clipped_high": loss.clipped_high,
        }
        if loss.kl_base is not None:
            found["kl_base"] = loss.kl_base
        found = {name: rows.detach().cpu() for name, rows in found.items()}
        seen = {}
        for row, i in enumerate(batch):
            seen[i] = TokenOutcome(
                float(advantage[i]),
                scored.old_logp[i],
                scored.entropy[i],
                scored.h[i],
                scored.uncertain[i],
                **{name: rows[row, : completions[i].length].clone() for name, rows in found.items()},
            )
        return loss.loss, seen

    def evaluate(self, iteration: int) -> Evaluation:
        """avg@n on the held-out prompts, at one temperature for all tokens. The same random numbers every time."""
        settings = self.recipe.evaluation
        seconds: dict[str, float] = {}
        completions, scores = self.collector.graded(
            self.held_out,
            settings.samples,
            AdaptiveTemperature(None, settings.temperature),
            DrawKey(self.recipe.seed, Stage.EVALUATION, iteration=0),
            seconds,
        )
        count = len(scores)
        metrics = {
            "eval/accuracy": sum(s.correct for s in scores) / count,
            "eval/solved": [
                sum(s.correct for s in scores[i : i + settings.samples]) for i in range(0, count, settings.samples)
            ],
            "eval/length_mean": sum(c.length for c in completions) / count,
            "eval/truncated_share": sum(c.truncated for c in completions) / count,
            "eval/entropy_mean": float(torch.cat([c.entropy for c in completions]).mean()),
            "eval/unparseable_share": sum(s.outcome == "unparseable" for s in scores) / count,
            "seconds/evaluate": sum(seconds.values()),
        }
        shown = range(0, count, settings.samples)[: self.recipe.logging.traces_per_iteration]
        traces = [make_trace(self.policy, "eval", iteration, completions[i], scores[i], None) for i in shown]
        return Evaluation(metrics, traces)

    def _logprobs(self, completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
        batch = Sequences.of(completions, self.accelerator.device)
        return self.policy.completion_logprobs(batch, self.recipe.rollout.temperature)


def rewards(collected: Collected) -> Tensor:
    """[B], fp64."""
    return torch.tensor([s.reward for s in collected.scores], dtype=torch.float64)


def advantages(collected: Collected, method: Method) -> Tensor:
    """Each completion's advantage against its group: [B], fp32, computed in fp64."""
    return group_advantage(
        rewards(collected),
        torch.tensor([c.length for c in collected.completions]),
        torch.tensor([c.prompt.index for c in collected.completions]),
        method.advantage_level,
    ).float()
