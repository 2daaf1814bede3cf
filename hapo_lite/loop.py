"""The training loop: rollout, score, advantage, update, log, evaluate, save.

Axes: P prompts and G completions per prompt make an iteration; B completions of a micro-batch, T completion tokens.
Every process holds the whole iteration's completions, which are small, and does its share of the forward passes, so the
signal, the groups and the denominator are global by construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import get_scheduler

from hapo_lite.algo.advantage import entropy_scale, group_advantage
from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import loss_denominator, loss_weights, method_loss
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import TokenSignals, fit_signal, uncertain_tokens
from hapo_lite.batching import deal_updates, micro_batches
from hapo_lite.checkpoint import TrainState
from hapo_lite.errors import UserError
from hapo_lite.metrics import entropy_metrics, gap_metrics, peak_memory_mb, rollout_metrics, update_metrics
from hapo_lite.policy import Policy
from hapo_lite.recipe import Recipe, TrainingSettings
from hapo_lite.records import Completion, EncodedPrompt, Sequences, TokenOutcome, pad
from hapo_lite.rollout.collect import Collected, Collector, PromptStream
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.trace import Trace, make_trace


@dataclass(frozen=True)
class Plan:
    """Which completions go where: updates[u] are the micro-batches of step u, members[u] all its completions.

    `resting` are micro-batches that are only scored: completions without an advantage have no gradient to compute.
    """

    members: list[list[int]]
    updates: list[list[list[int]]]
    resting: list[list[int]]


@dataclass(frozen=True)
class Scored:
    """The old policy on every completion, in order: [T] log-probabilities and entropies, and what follows from them.

    signal, h, uncertain (bool): by token, [T]. scale: [B], EDGE-GRPO's factor on the advantage. base_logp: of the base
    model, [T]; None unless the method asks for it.
    """

    old_logp: list[Tensor]
    entropy: list[Tensor]
    signal: EntropySignal
    h: list[Tensor]
    uncertain: list[Tensor]
    scale: Tensor
    base_logp: list[Tensor] | None

    def trained(self, method: Method) -> list[Tensor]:
        """Which tokens count in the loss, bool [T]."""
        if method.trained_tokens == "uncertain":
            return self.uncertain
        return [torch.ones_like(u) for u in self.uncertain]


@dataclass(frozen=True)
class Evaluation:
    """avg@n on the held-out prompts, and traces of a few of them."""

    metrics: dict[str, Any]
    traces: list[Trace]


class Stopwatch:
    """Seconds by stage, of one iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


class Loop:
    """One run's moving parts. `step` does an iteration and returns the state after it.

    enter: told what begins, for status.json.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        collector: Collector,
        stream: PromptStream,
        held_out: Sequence[EncodedPrompt],
        accelerator: Accelerator,
        enter: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.recipe, self.policy, self.collector, self.enter = recipe, policy, collector, enter
        self.stream, self.held_out, self.accelerator = stream, held_out, accelerator
        self.parameters = list(policy.trainable().values())
        self.optimizer = accelerator.prepare(make_optimizer(recipe.training, self.parameters))
        schedule = recipe.training.schedule
        self.scheduler = get_scheduler(
            "constant_with_warmup" if schedule == "constant" else schedule,
            self.optimizer.optimizer,
            num_warmup_steps=recipe.training.warmup_updates,
            num_training_steps=recipe.training.iterations * recipe.training.updates_per_iteration,
        )

    def step(
        self, state: TrainState, commit: Callable[[], None] = lambda: None
    ) -> tuple[TrainState, dict[str, float], list[Trace]]:
        """One iteration. `commit` is called when the weights are about to change: until then it can be given up."""
        watch = Stopwatch()
        iteration = state.iteration + 1
        collected = self.rollout(state, iteration)
        watch.lap("rollout")
        metrics = rollout_metrics(collected)
        state = replace(state, iteration=iteration, cursor=state.cursor + collected.prompts_used)
        state = replace(state, tokens=state.tokens + collected.tokens_sampled)
        traces: list[Trace] = []
        if collected.completions:
            advantage = advantages(collected, self.recipe.method)
            traced = choose_traced(collected, self.recipe.logging.traces_per_iteration)
            plan = self.plan(collected.completions, advantage, traced, iteration)
            self.enter("scoring")
            scored = self.score(collected.completions, plan)
            watch.lap("score")
            commit()
            self.enter("update")
            outcomes, update = self.update(collected.completions, advantage, scored, plan)
            watch.lap("update")
            metrics |= entropy_metrics(scored.entropy, collected.scores, scored.signal, scored.uncertain)
            metrics |= update_metrics(list(outcomes.values()))
            metrics |= gap_metrics(collected.completions, scored.old_logp) | update
            traces = [
                make_trace(
                    self.policy,
                    "train",
                    iteration,
                    collected.completions[i],
                    collected.scores[i],
                    state.signal if self.recipe.method.adaptive_temperature else None,
                    scored.signal,
                    outcomes[i],
                )
                for i in traced
            ]
            state = replace(state, signal=scored.signal, updates=state.updates + len(plan.updates))
        else:
            commit()
        seconds = {**watch.seconds, **collected.seconds}
        metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
        metrics["tokens_per_second/sampled"] = collected.tokens_sampled / max(collected.seconds["rollout"], 1e-9)
        metrics["memory/peak_mb"] = peak_memory_mb(self.accelerator.device)
        return state, {"iteration": iteration, "tokens": state.tokens, "updates": state.updates, **metrics}, traces

    def rollout(self, state: TrainState, iteration: int) -> Collected:
        """P graded groups, sampled with the previous iteration's signal."""
        settings, method = self.recipe.rollout, self.recipe.method
        return self.collector.collect(
            self.stream,
            state.cursor,
            groups=settings.prompts_per_iteration,
            samples=settings.completions_per_prompt,
            processor=AdaptiveTemperature(
                state.signal if method.adaptive_temperature else None, settings.temperature, method.tau, settings.top_p
            ),
            seed=self.recipe.seed,
            iteration=iteration,
            token_budget=self.recipe.token_budget if settings.dynamic_sampling else None,
        )

    def plan(self, completions: Sequence[Completion], advantage: Tensor, traced: Sequence[int], iteration: int) -> Plan:
        """Deal completions to steps, and steps to micro-batches. Scoring uses the same micro-batches as the update.

        So the same products are computed on the same shapes, and ratio = 1 to the last bit before the first update.
        """
        training = self.recipe.training
        lengths = [len(c.prompt.ids) + c.length for c in completions]
        members = deal_updates(len(completions), training.updates_per_iteration, self.recipe.seed, iteration)
        members = [part for part in members if part]
        active = set(advantage.nonzero().squeeze(1).tolist()) | set(traced)
        if self.recipe.method.needs_base:
            active = set(range(len(completions)))  # the divergence from the base has a gradient everywhere
        budget = training.micro_batch_tokens
        updates = [micro_batches([i for i in part if i in active], lengths, budget) for part in members]
        resting = micro_batches([i for i in range(len(completions)) if i not in active], lengths, budget)
        return Plan(members, updates, resting)

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
        try:
            signal = fit_signal(method, torch.cat(entropy))
        except ValueError as error:
            raise UserError(f"the policy's log-probabilities are not finite any more: {error}") from error
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
        for batch in [b for part in (*plan.updates, plan.resting) for b in self._mine(part)]:
            logp, entropy = (t.cpu() for t in self._logprobs([completions[i] for i in batch]))
            for row, i in enumerate(batch):
                length = completions[i].length
                found[i] = logp[row, :length].clone(), entropy[row, :length].clone()
        found = self._everyones(found)
        return [found[i][0] for i in range(len(completions))], [found[i][1] for i in range(len(completions))]

    def update(
        self, completions: Sequence[Completion], advantage: Tensor, scored: Scored, plan: Plan
    ) -> tuple[dict[int, TokenOutcome], dict[str, float]]:
        """The optimiser steps of one iteration. The gradient of a step does not depend on its micro-batches."""
        outcomes: dict[int, TokenOutcome] = {}
        losses, norms = [], []
        trained = torch.stack([t.sum() for t in scored.trained(self.recipe.method)])
        rate = 0.0
        for members, batches in zip(plan.members, plan.updates, strict=True):
            denominator = loss_denominator(trained[members], self.recipe.method.loss_average)
            self.optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=self.accelerator.device)
            for batch in self._mine(batches):
                part, seen = self._micro_batch(batch, completions, advantage, scored, denominator)
                self.accelerator.backward(part)
                loss += part.detach()
                outcomes |= seen
            self._share_gradients()
            rate = self.scheduler.get_last_lr()[0]
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.training.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            losses.append(float(self.accelerator.reduce(loss, "sum")))
            norms.append(float(norm))
        self.optimizer.zero_grad(set_to_none=True)
        return self._everyones(outcomes), {
            "update/loss": sum(losses) / len(losses),
            "update/grad_norm": sum(norms) / len(norms),
            "update/learning_rate": rate,
        }

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
            seed=self.recipe.seed,
            stage=1,
            iteration=0,
            seconds=seconds,
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
        with self.accelerator.autocast():
            return self.policy.completion_logprobs(
                Sequences.of(completions, self.accelerator.device), self.recipe.rollout.temperature
            )

    def _mine(self, batches: list[list[int]]) -> list[list[int]]:
        """This process's share of some micro-batches: the same share whenever it is asked."""
        return batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def _everyones(self, found: dict) -> dict:
        if self.accelerator.num_processes == 1:
            return found
        return dict(gather_object(list(found.items())))

    def _share_gradients(self) -> None:
        """Sum the adapter's gradients over processes. The losses are already divided by the global denominator."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in self.parameters]), "sum")
            for p, grad in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
                p.grad.copy_(grad.view_as(p))


def make_optimizer(settings: TrainingSettings, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW, whose states may be paged out to main memory."""
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if settings.optimizer == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(parameters, **options)


def advantages(collected: Collected, method: Method) -> Tensor:
    """Each completion's advantage against its group: [B], fp32, computed in fp64."""
    return group_advantage(
        torch.tensor([s.reward for s in collected.scores], dtype=torch.float64),
        torch.tensor([c.length for c in collected.completions]),
        torch.tensor([c.prompt.index for c in collected.completions]),
        method.advantage_level,
    ).float()


def choose_traced(collected: Collected, count: int) -> list[int]:
    """Completions to record: from the first groups on, of each group one that is correct and one that is not."""
    chosen: list[int] = []
    seen: set[tuple[int, bool]] = set()
    for i, (completion, score) in enumerate(zip(collected.completions, collected.scores, strict=True)):
        key = (completion.prompt.index, score.correct)
        if key not in seen and len(chosen) < count:
            seen.add(key)
            chosen.append(i)
    return chosen
