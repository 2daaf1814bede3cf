"""One warm start, in its folder `runs/NAME-sft/`, with the folder, resumption and interrupts of any other run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from hapo_lite.errors import counted
from hapo_lite.model.policy import Policy
from hapo_lite.model.template import text_of
from hapo_lite.recipe import Recipe
from hapo_lite.records import EncodedPrompt
from hapo_lite.runs.summary import WarmSummary
from hapo_lite.sft.loop import WarmLoop
from hapo_lite.sft.recipe import WarmRecipe
from hapo_lite.sft.recorder import WarmRecorder
from hapo_lite.sft.solutions import Encoder, WorkedPrompts, worked_prompts
from hapo_lite.tasks.data import Column
from hapo_lite.tasks.pass_rates import PassRates
from hapo_lite.tasks.stream import LazyPrompts
from hapo_lite.train.collect import Collector
from hapo_lite.train.loop import Loop
from hapo_lite.train.prompts import Data, first_prompt, load_data, shown
from hapo_lite.train.recorder import Recorder
from hapo_lite.train.run import Run, run_in_folder


def sft(recipe: Recipe) -> WarmSummary:
    """Train an adapter on the worked solutions of `recipe`'s data, and return the summary.

    It goes on from the newest checkpoint if there is one. Raises UserError for a problem that the user can mend. After
    a signal it writes a checkpoint and raises Interrupted.
    """
    return cast(WarmSummary, run_in_folder(WarmRecipe.of(recipe), WarmRun))


@dataclass(frozen=True)
class WarmRun(Run):
    """One warm start in its folder."""

    recipe: WarmRecipe

    def read_data(self, columns: Sequence[Column]) -> Data:
        recipe = self.recipe
        return load_data(recipe.data, recipe.evaluation, recipe.seed, self.display.say, columns, solutions=True)

    def training_prompts(self, data: Data, policy: Policy) -> WorkedPrompts:
        progress = self.display.progress
        with progress.within("reading the solutions"):
            return worked_prompts(data.training, policy, self.recipe, progress, self.display.say)

    def make_loop(
        self,
        policy: Policy,
        collector: Collector,
        prompts: LazyPrompts,
        held_out: Sequence[EncodedPrompt],
        rates: PassRates,
    ) -> WarmLoop:
        return WarmLoop(self.recipe, policy, collector, cast(WorkedPrompts, prompts), held_out)

    def make_recorder(self, loop: Loop) -> Recorder:
        return WarmRecorder(self.folder, self.recipe, loop, self.display.say)

    def introduction(self, policy: Policy, prompts: LazyPrompts, held_out: Sequence[EncodedPrompt]) -> Iterator[str]:
        recipe = self.recipe
        kept = cast(WorkedPrompts, prompts).kept
        adapter = sum(p.numel() for p in policy.trainable().values())
        updates = counted(recipe.updates(len(prompts)), "update")
        yield (
            f"{recipe.name}: supervised warm start of {recipe.model.name}, base {recipe.model.quantization}, adapter "
            f"{adapter / 1e6:.2f} M; {len(prompts):,} worked solutions, {len(kept)} kept aside, "
            f"{counted(len(held_out), 'prompt')} held out; {updates} of {recipe.sft.batch_size}; "
            f"{self.accelerator.num_processes} x {self.accelerator.device}"
        )
        if policy.started_from:
            yield f"going on from the adapter {policy.started_from}"
        yield from first_prompt(prompts, policy)
        yield from first_solution(prompts, policy)

    def advice(self) -> list[str]:
        return []  # The recipe's advice is about reinforcement learning.

    def stuck(self, iteration: int, skipped: int) -> str:
        return (
            f"stopped after update {iteration}, which is saved: {skipped} updates were skipped in a row "
            f"(training.max_skipped = {self.recipe.training.max_skipped}), since the loss or its gradient is not "
            "finite: lower sft.learning_rate, or set model.dtype=fp32"
        )


def first_solution(prompts: LazyPrompts, policy: Policy) -> Iterator[str]:
    """The first worked solution as the model is taught to write it, special tokens included."""
    first = prompts[0]
    if first is not None:
        ids = Encoder(policy).solution(first).ids.tolist()
        text = shown(text_of(policy.tokenizer, ids, hidden=()))
        yield f"its solution, {counted(len(ids), 'token')}:\n{textwrap.indent(text, '  | ', lambda line: True)}"
