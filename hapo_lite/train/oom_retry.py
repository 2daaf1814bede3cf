"""Repeats work for which memory ran out, with batches of half the size.

A step that ran out of memory is discarded and computed again as a whole. Neither gradients nor random numbers depend on
batch sizes, so the run learns the same as it would have learned with enough memory. A copy of the base that only saves
time is given up before any batch is halved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.oom import OutOfMemory, is_out_of_memory
from hapo_lite.model.unpacked import UnpackedBase, Unpacking
from hapo_lite.rollout.engine import Engine
from hapo_lite.train.batching import Parts, micro_batches

Result = TypeVar("Result")


class OomRetry:
    """Repeats work after memory ran out, and remembers the sizes that fitted. The stages of a run share one object.

    tell: called at each shortage with the arguments of `Observer.on_shortage`. count: number of shortages so far.
    tokens: the micro-batch budget after the last shortage; None before the first one. dense: makes the unpacked copy of
    the policy's base; None if there is none.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count = 0
        self.tokens: int | None = None
        self.dense: UnpackedBase | None = None
        self.tell: Callable[[str, bool], None] = lambda sentence, weights_unchanged: None

    @contextlib.contextmanager
    def together(self, lockstep: bool = False) -> Iterator[None]:
        """A context that raises OutOfMemory in every process if memory runs out in one. It must hold no collective.

        lockstep: the context does hold collectives, in which the other processes wait for this one. The process that is
        short of memory then raises UserError, and the launcher ends the others.
        """
        short = ""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            short = first_line(error)
            if lockstep:
                raise UserError(
                    f"memory ran out ({short}), which a base split by FSDP cannot go on from: lower "
                    "training.micro_batch_tokens and start again, from the newest checkpoint"
                ) from error
        if lockstep:
            return
        if self._anywhere(bool(short)):
            raise OutOfMemory(short or "in another process")

    def _anywhere(self, here: bool) -> bool:
        """Whether `here` is true in any process. Every process calls it at the same place."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _give_copy_up(self, stage: str, reason: str, weights_unchanged: bool) -> bool:
        """Keep the base packed in all processes if a copy stood in the way in one. Returns whether one did."""
        if not self._anywhere(self.dense is not None and self.dense.in_the_way):
            return False
        if self.dense is not None:
            self.dense.give_up()
        self._report(stage, "rollout.unpacked_base = never", reason, weights_unchanged)
        return True

    def budget(self, tokens: int) -> int:
        """The micro-batch budget: the recipe's `tokens`, or the budget after the last shortage if that is lower."""
        return tokens if self.tokens is None else min(tokens, self.tokens)

    def fit(
        self, stage: str, parts: Parts, lengths: Sequence[int], work: Callable[[Parts], Result], weights_unchanged: bool
    ) -> tuple[Parts, Result]:
        """Do `work` on micro-batches, and again on smaller ones until it does not raise OutOfMemory.

        lengths: tokens of each member, prompt included. weights_unchanged: as `Observer.on_shortage` says.
        Before that, a copy of the base is given up, if the recipe does not ask for it. Returns the micro-batches that
        fitted and what `work` returned. Raises UserError if no micro-batch can be cut.
        """
        while True:
            try:
                return parts, work(parts)
            except OutOfMemory as error:
                reason = str(error)
            clear_device_cache(garbage_collection=True)
            if self._give_copy_up(stage, reason, weights_unchanged):
                continue
            batches = [batch for part in parts for batch in part]
            padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches if len(batch) > 1]
            if not padded:
                longest = max(lengths[i] for batch in batches for i in batch)
                raise UserError(
                    f"memory ran out in the {stage} with one sequence at a time, of up to {longest:,} tokens "
                    f"({reason}): set model.gradient_checkpointing=true, or lower rollout.max_new_tokens or "
                    "data.max_prompt_tokens with another name="
                )
            budget = self.budget(max(padded) // 2)
            self.tokens = budget
            self._report(stage, f"training.micro_batch_tokens = {budget}", reason, weights_unchanged)
            parts = [micro_batches([i for batch in part for i in batch], lengths, budget) for part in parts]

    def fit_rollout(self, engine: Engine, count: int, sample: Callable[[], Result], weights_unchanged: bool) -> Result:
        """Call `sample`, and again with half of engine.batch_size until memory suffices.

        As in `fit`, a copy of the base is given up first. count: completions that `sample` writes. weights_unchanged:
        as `Observer.on_shortage` says. Raises UserError if one completion alone does not fit.
        """
        while True:
            try:
                with self.together():
                    return sample()
            except OutOfMemory as error:
                reason = str(error)
            clear_device_cache(garbage_collection=True)
            if self._give_copy_up("rollout", reason, weights_unchanged):
                continue
            if engine.batch_size == 1:
                asked = self.dense is not None and self.dense.wanted is Unpacking.ALWAYS
                raise UserError(
                    f"memory ran out in the rollout with one completion at a time ({reason}): "
                    f"{'set rollout.unpacked_base=auto, or ' if asked else ''}lower rollout.max_new_tokens or "
                    "data.max_prompt_tokens with another name="
                )
            engine.batch_size = max(1, min(engine.batch_size, max(count, 2)) // 2)
            self._report("rollout", f"rollout.batch_size = {engine.batch_size}", reason, weights_unchanged)

    def _report(self, stage: str, setting: str, reason: str, weights_unchanged: bool) -> None:
        self.count += 1
        self.tell(f"memory ran out in the {stage} ({reason}); done again with {setting}", weights_unchanged)
