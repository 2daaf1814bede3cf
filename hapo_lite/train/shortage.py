"""When memory runs out in a run: what was being done is dropped, the batch is halved, and the same is done again.

Nothing is learned from half a step. Micro-batches change no gradient and the rows of a batch no random number, so a run
that was short of memory learns what it would have learned with enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from hapo_lite.errors import UserError
from hapo_lite.model.oom import OutOfMemory, is_shortage
from hapo_lite.train.batching import Parts, micro_batches

Found = TypeVar("Found")


class Shortage:
    """What a run does when memory is short. One object of a run, shared by its stages; it remembers what fitted.

    tell: given a sentence each time, and whether the weights are still those that the iteration began with, so that a
    checkpoint can be made of them. count: how often it has happened. tokens: the micro-batch budget that fitted at
    last; None: as the recipe says.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.count, self.tokens = 0, None
        self.tell: Callable[[str, bool], None] = lambda sentence, whole: None

    @contextlib.contextmanager
    def together(self, lockstep: bool = False) -> Iterator[None]:
        """Raises OutOfMemory in every process if memory runs out inside it in one. No collective may stand inside.

        lockstep: there are collectives, in which the others wait for this process. So UserError ends it, and the
        launcher the others.
        """
        short = ""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            short = f"{error}".strip().partition("\n")[0] or type(error).__name__
            if lockstep:
                raise UserError(
                    f"memory ran out ({short}), which a base split by FSDP cannot go on from: lower "
                    "training.micro_batch_tokens and start again, from the newest checkpoint"
                ) from error
        if lockstep:
            return
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(bool(short)), device=self.accelerator.device)
            someone = bool(self.accelerator.reduce(flag, "sum") > 0)
            short = short or ("in another process" if someone else "")
        if short:
            raise OutOfMemory(short)

    def budget(self, tokens: int) -> int:
        """The micro-batch budget: the recipe's `tokens`, or what fitted at last if that is less."""
        return min(tokens, self.tokens or tokens)

    def fit(
        self, stage: str, parts: Parts, lengths: Sequence[int], work: Callable[[Parts], Found], whole: bool
    ) -> tuple[Parts, Found]:
        """Do `work` on micro-batches, and again on smaller ones until it does not raise OutOfMemory.

        lengths: tokens of each member, prompt included. whole: the weights are still those the iteration began with.
        Returns the micro-batches that fitted and what `work` returned. Raises UserError if no micro-batch can be cut.
        """
        while True:
            try:
                return parts, work(parts)
            except OutOfMemory as error:
                reason = str(error)
            clear_device_cache(garbage_collection=True)
            batches = [batch for part in parts for batch in part]
            padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches if len(batch) > 1]
            if not padded:
                longest = max(lengths[i] for batch in batches for i in batch)
                raise UserError(
                    f"memory ran out in the {stage} with one sequence at a time, of up to {longest:,} tokens "
                    f"({reason}): set model.gradient_checkpointing=true, or lower rollout.max_new_tokens or "
                    "data.max_prompt_tokens with another name="
                )
            self.tokens = min(self.tokens or max(padded), max(padded) // 2)
            self._say(stage, f"training.micro_batch_tokens = {self.tokens}", reason, whole)
            parts = [micro_batches([i for batch in part for i in batch], lengths, self.tokens) for part in parts]

    def fit_rollout(self, engine, count: int, sample: Callable[[], Found], whole: bool) -> Found:
        """Call `sample`, which writes `count` completions, until it fits; each time engine.batch_size is halved.

        Raises UserError if one completion alone does not fit.
        """
        while True:
            try:
                with self.together():
                    return sample()
            except OutOfMemory as error:
                reason = str(error)
            clear_device_cache(garbage_collection=True)
            if engine.batch_size == 1:
                raise UserError(
                    f"memory ran out in the rollout with one completion at a time ({reason}): lower "
                    "rollout.max_new_tokens or data.max_prompt_tokens with another name="
                )
            engine.batch_size = max(1, min(engine.batch_size, max(count, 2)) // 2)
            self._say("rollout", f"rollout.batch_size = {engine.batch_size}", reason, whole)

    def _say(self, stage: str, setting: str, reason: str, whole: bool) -> None:
        self.count += 1
        self.tell(f"memory ran out in the {stage} ({reason}); done again with {setting}", whole)
