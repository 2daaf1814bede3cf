"""One update of a warm start, and the loss on the solutions that are kept aside.

The loss of an update is the mean negative log-likelihood over all completion tokens of its solutions, in nats, so its
gradient does not depend on how the solutions are cut into micro-batches. Axes: B solutions of a micro-batch, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hapo_lite.model.policy import Policy
from hapo_lite.records import EncodedPrompt, Graded, Sequences
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.sft.recipe import WarmRecipe
from hapo_lite.sft.solutions import Encoder, Solution, WorkedPrompts
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.batching import Parts, micro_batches, padded_tokens
from hapo_lite.train.collect import Collector
from hapo_lite.train.held_out import HeldOut
from hapo_lite.train.loop import Iteration, Loop
from hapo_lite.train.optimizer import advance
from hapo_lite.train.update import Passes, sum_gradients


class WarmLoop(Loop):
    """The parts of a warm start. `step` does one update; `evaluate` measures the loss and, at both ends, the answers.

    `recipe` has the section `training` of the warm start, so that the optimiser and the schedule are its own.
    """

    def __init__(
        self,
        recipe: WarmRecipe,
        policy: Policy,
        collector: Collector,
        prompts: WorkedPrompts,
        held_out: Sequence[EncodedPrompt] = (),
    ) -> None:
        resolved = recipe.model_copy(update={"training": recipe.training_of(len(prompts))})
        super().__init__(resolved, policy, collector, PromptStream(prompts, recipe.seed), held_out)
        self.kept = prompts.kept
        self.encoder = Encoder(policy)

    @property
    def samples(self) -> bool:
        return bool(self.held_out)

    @property
    def evaluates(self) -> bool:
        return bool(self.held_out or self.kept)

    def step(self, state: TrainState) -> Iteration:
        """Do one update from `state`. The weights change only after `observer.before_update`."""
        began = time.perf_counter()
        shortages = self.resources.oom.count
        prompts = self.stream.take(state.cursor, self.recipe.sft.batch_size)
        solutions = [self.encoder.solution(prompt) for prompt in prompts]
        tokens = sum(solution.length for solution in solutions)
        state = replace(
            state,
            iteration=state.iteration + 1,
            cursor=prompts[-1].index + 1,
            tokens=state.tokens + tokens,
        )
        loss = self.gradients(solutions)
        self.observer.before_update()
        rate = self.learner.scheduler.get_last_lr()[0]
        norm, problem = advance(self.accelerator, self.learner, loss, self.recipe.training.max_grad_norm)
        self.learner.optimizer.zero_grad(set_to_none=True)
        state = replace(
            state,
            updates=state.updates + (problem is None),
            skipped_in_a_row=0 if problem is None else state.skipped_in_a_row + 1,
        )
        if problem is not None:
            self.observer.on_note(f"update {state.iteration} skipped: {problem}")
        read = sum(len(solution.prompt.ids) for solution in solutions) + tokens
        metrics = {
            "iteration": state.iteration,
            "updates": state.updates,
            "tokens": state.tokens,
            "sft/loss": loss,
            "update/grad_norm": norm,
            "update/learning_rate": rate,
            "update/skipped": int(problem is not None),
            "tokens_per_second/read": read / (time.perf_counter() - began),
            "memory/shortages": self.resources.oom.count - shortages,
        }
        return Iteration(state, metrics, [])

    def gradients(self, solutions: Sequence[Solution]) -> float:
        """Leave the gradient of the solutions' mean loss in the parameters, and return that loss, nats a token.

        Raises UserError if memory does not suffice for one solution at a time.
        """
        progress, processes = self.resources.progress, self.resources.processes
        progress.enter("update")
        lengths = sequence_lengths(solutions)
        batches = micro_batches(range(len(solutions)), lengths, self.token_limit)
        share = processes.rank_share(batches)
        progress.count(len(share), "micro-batches", padded_tokens(share, lengths))
        denominator = sum(solution.length for solution in solutions)

        def loss_of(batch: list[int]) -> Tensor:
            return self.total_loss([solutions[i] for i in batch]) / denominator

        def attempt(parts: Parts) -> Tensor:
            passes = Passes(self.policy, loss_of, loss_of, lengths)
            return sum_gradients(parts[0], passes, self.learner, self.resources)

        _, loss = self.resources.oom.fit("update", [batches], lengths, attempt, weights_unchanged=True)
        return float(self.accelerator.reduce(loss, "sum"))

    def total_loss(self, solutions: Sequence[Solution]) -> Tensor:
        """The negative log-likelihood of a micro-batch, summed over its completion tokens: scalar, nats."""
        logp, _ = self.policy.completion_logprobs(Sequences.of(solutions, self.policy.device))
        return -logp.sum()

    def evaluate(self, iteration: int) -> HeldOut:
        """The loss on the solutions kept aside; before the first update and after the last one also avg@n."""
        ends = (0, self.recipe.training.iterations)
        found = super().evaluate(iteration) if self.held_out and iteration in ends else HeldOut(Graded([], []), 0, {})
        if not self.kept:
            return found
        began = time.perf_counter()
        loss = self.kept_loss()
        metrics = {"sft/held_out_loss": loss, "seconds/held_out_loss": time.perf_counter() - began}
        return replace(found, metrics=metrics | found.metrics)

    @torch.no_grad()
    def kept_loss(self) -> float:
        """Mean negative log-likelihood over the completion tokens of the solutions kept aside, nats."""
        progress, processes = self.resources.progress, self.resources.processes
        progress.enter("held-out loss")
        lengths = sequence_lengths(self.kept)

        def attempt(parts: Parts) -> Tensor:
            share = processes.rank_share(parts[0])
            progress.count(len(share), "micro-batches", padded_tokens(share, lengths))
            total = torch.zeros((), dtype=torch.float64)
            with self.policy.unpacked(exact=True), self.resources.oom.together(lockstep=processes.sharded):
                for batch in share:
                    total += self.total_loss([self.kept[i] for i in batch]).double().cpu()
                    progress.advance(1, padded_tokens([batch], lengths))
                for batch in processes.padding(parts[0]):
                    self.total_loss([self.kept[i] for i in batch])
            return total

        batches = micro_batches(range(len(self.kept)), lengths, self.token_limit)
        _, total = self.resources.oom.fit("held-out loss", [batches], lengths, attempt, weights_unchanged=False)
        total = self.accelerator.reduce(total.to(self.accelerator.device, torch.float32), "sum")
        return float(total) / sum(solution.length for solution in self.kept)


def sequence_lengths(solutions: Sequence[Solution]) -> list[int]:
    """Tokens of each sequence, prompt included."""
    return [len(solution.prompt.ids) + solution.length for solution in solutions]
