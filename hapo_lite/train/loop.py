"""The training loop. One iteration: sample, score, credit, update; the run records, evaluates and saves.

Axes: P prompts and G completions per prompt make an iteration; B completions of a micro-batch, T completion tokens.
Every process holds the completions of the whole iteration, which are small, and does its share of the forward passes.
The signal, the groups and the denominator are therefore the same on every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hapo_lite.model.policy import Policy
from hapo_lite.model.sharding import sharded_modules
from hapo_lite.recipe import Recipe
from hapo_lite.records import EncodedPrompt, Graded
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.checkpoint import RunParts, TrainState
from hapo_lite.runs.skipped import SkippedStep
from hapo_lite.runs.trace import Trace
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.batching import Plan, deal_updates, make_plan, micro_batches
from hapo_lite.train.collect import Collected, Collector, GroupsWanted
from hapo_lite.train.finite import NotFinite, check_rewards
from hapo_lite.train.held_out import HeldOut, evaluate_held_out
from hapo_lite.train.metrics import Stopwatch, iteration_metrics, learning_metrics, rollout_metrics
from hapo_lite.train.observer import Observer
from hapo_lite.train.optimizer import make_learner
from hapo_lite.train.processes import Processes
from hapo_lite.train.resources import Resources
from hapo_lite.train.scoring import Scoring, advantages
from hapo_lite.train.traces import choose_traced, training_traces
from hapo_lite.train.update import Update


class Iteration(NamedTuple):
    """state: the run's state after the iteration. metrics: its line in metrics.jsonl. traces: a few completions."""

    state: TrainState
    metrics: dict[str, float]
    traces: list[Trace]


class Loop:
    """The parts of a run that an iteration uses. `step` does one iteration."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        collector: Collector,
        stream: PromptStream,
        held_out: Sequence[EncodedPrompt] = (),
        observer: Observer | None = None,
    ) -> None:
        self.recipe = recipe
        self.policy = policy
        self.collector = collector
        self.stream = stream
        self.held_out = held_out
        self.accelerator = collector.accelerator
        self.learner = make_learner(recipe.training, policy, self.accelerator)
        processes = Processes(self.accelerator, sharded=bool(sharded_modules(policy)))
        self.resources = Resources(self.accelerator, processes, collector.oom, collector.progress)
        self.resources.oom.dense = policy.dense
        self.watch(observer or Observer())

    @property
    def parts(self) -> RunParts:
        """The parts that a checkpoint saves and restores."""
        return RunParts(self.policy, self.learner.optimizer, self.learner.scheduler, self.stream)

    @property
    def samples(self) -> bool:
        """Whether the run samples completions at all."""
        return True

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.held_out)

    def watch(self, observer: Observer) -> None:
        """Report the events of the following iterations to `observer`, in place of the observer so far."""
        self.observer = observer
        self.resources.oom.tell = observer.on_shortage

    def step(self, state: TrainState) -> Iteration:
        """Do one iteration from `state`. The weights change only after `observer.before_update`."""
        clock = Stopwatch()
        shortages_before = self.resources.oom.count
        state = replace(state, iteration=state.iteration + 1)
        collected = self.sample(state)
        clock.lap("rollout")
        state = state.after_rollout(collected.prompts_used, collected.tokens_sampled)
        state = replace(state, standings=self.stream.after(state.standings, collected.results, state.iteration))
        metrics = rollout_metrics(collected)
        traces: list[Trace] = []
        if collected.completions:
            self.observer.on_graded(collected.graded)
            state, learned, traces = self.learn(state, collected.graded, clock)
            metrics |= learned
        else:
            self.observer.before_update()
        metrics |= iteration_metrics(collected, clock, self.accelerator.device)
        metrics["memory/shortages"] = self.resources.oom.count - shortages_before
        counts = {"iteration": state.iteration, "tokens": state.tokens, "updates": state.updates}
        return Iteration(state, {**counts, **metrics}, traces)

    def sample(self, state: TrainState) -> Collected:
        """Sample P graded groups for iteration `state.iteration`, with the signal of the iteration before."""
        rollout, method = self.recipe.rollout, self.recipe.method
        signal = state.signal if method.adaptive_temperature else None
        wanted = GroupsWanted(
            rollout.prompts_per_iteration,
            rollout.completions_per_prompt,
            AdaptiveTemperature(signal, rollout.temperature, method.tau, rollout.top_p, rollout.top_k, rollout.min_p),
            DrawKey(self.recipe.seed, Stage.TRAINING, state.iteration),
            self.recipe.token_budget if rollout.dynamic_sampling else None,
            tuple(self.recipe.reward.normalised),
        )
        draw = self.stream.draw(state.cursor, state.iteration, state.standings)
        return self.collector.collect(draw, wanted)

    def learn(self, state: TrainState, graded: Graded, clock: Stopwatch) -> Iteration:
        """Score and update. A non-finite value found before the first update skips every update of the iteration."""
        traced = choose_traced(graded, self.recipe.logging.traces_per_iteration)
        try:
            check_rewards(graded)
            advantage = advantages(graded, self.recipe.method, self.recipe.reward.normalised)
            plan = self.plan(graded, self.active(advantage.tolist(), traced), state.iteration)
            self.resources.progress.enter("scoring")
            plan, experience = self.scoring.score(graded, advantage, plan, self.selection_key(state.iteration))
        except NotFinite as found:
            return self.skip(state, graded, str(found))
        clock.lap("score")
        self.resources.progress.enter("update")
        updated = self.update.run(experience, plan, state, self.observer)
        clock.lap("update")
        sampled_with = state.signal if self.recipe.method.adaptive_temperature else None
        traces = training_traces(self.policy, experience, updated.outcomes, traced, state.iteration, sampled_with)
        metrics = learning_metrics(experience, updated.outcomes) | updated.metrics
        state = state.after_updates(experience.signal, updated.taken, updated.skipped_in_a_row)
        return Iteration(state, metrics, traces)

    def active(self, advantage: Sequence[float], traced: Sequence[int]) -> set[int]:
        """Places of the completions that take part in the updates: those with a gradient, and the traced ones."""
        if self.recipe.method.needs_base:
            return set(range(len(advantage)))  # The divergence from the base has a gradient everywhere.
        return {i for i, value in enumerate(advantage) if value != 0.0} | set(traced)

    def selection_key(self, iteration: int) -> DrawKey:
        """What the random numbers depend on with which the method singles out tokens."""
        return DrawKey(self.recipe.seed, Stage.SELECTION, iteration)

    def plan(self, graded: Graded, active: set[int], iteration: int) -> Plan:
        """Deal the completions to optimiser steps and micro-batches."""
        training = self.recipe.training
        steps = deal_updates(len(graded), training.updates_per_iteration, self.recipe.seed, iteration)
        return make_plan(steps, graded.sequence_lengths, active, self.token_limit)

    def skip(self, state: TrainState, graded: Graded, reason: str) -> Iteration:
        """End the iteration without any of its updates. reason: which value is not finite."""
        self.observer.before_update()
        batches = micro_batches(range(len(graded)), graded.sequence_lengths, self.token_limit)
        self.observer.on_skip(SkippedStep(state.iteration, 0, reason, graded, batches))
        metrics: dict[str, float] = {"update/skipped": self.recipe.training.updates_per_iteration}
        return Iteration(replace(state, skipped_in_a_row=state.skipped_in_a_row + 1), metrics, [])

    @property
    def token_limit(self) -> int:
        """Most padded tokens in a micro-batch: the recipe's number, or the number that fitted into memory if lower."""
        return self.resources.oom.budget(self.recipe.training.micro_batch_tokens)

    @property
    def scoring(self) -> Scoring:
        """The scoring stage, with the recipe's settings."""
        return Scoring(self.policy, self.recipe.method, self.recipe.rollout, self.resources)

    @property
    def update(self) -> Update:
        """The update stage, with the recipe's settings."""
        recipe = self.recipe
        return Update(
            self.policy,
            recipe.method,
            recipe.rollout,
            recipe.training.max_grad_norm,
            self.learner,
            self.resources,
        )

    def evaluate(self, iteration: int) -> HeldOut:
        """Evaluate avg@n on the held-out prompts, with the same random numbers at every iteration."""
        key = DrawKey(self.recipe.seed, Stage.EVALUATION, 0)
        traced = self.recipe.logging.traces_per_iteration
        held_out = evaluate_held_out(self.collector, self.held_out, self.recipe.evaluation, key)
        return held_out.with_traces(self.policy, iteration, traced)
