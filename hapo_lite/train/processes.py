"""Division of an iteration's forward and backward passes among several processes.

Every process holds all completions of the iteration, and calls the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

Batches = list[list[int]]
"""Micro-batches, as lists of places among the iteration's completions."""
Key = TypeVar("Key")
Value = TypeVar("Value")


class Processes:
    """The processes of a run. sharded: the base is split over them, so that all must run it equally often."""

    def __init__(self, accelerator: Accelerator, sharded: bool) -> None:
        self.accelerator = accelerator
        self.sharded = sharded
        self.rank = accelerator.process_index
        self.count = accelerator.num_processes

    def rank_share(self, batches: Batches) -> Batches:
        """The micro-batches of this process. Each call returns the same ones."""
        return batches[self.rank :: self.count]

    def padding(self, batches: Batches) -> Batches:
        """Dummy micro-batches, at most one, that keep collectives in step; their results are discarded."""
        missing = self.sharded and len(self.rank_share(batches)) < len(batches[:: self.count])
        return batches[:1] if missing else []

    def gather(self, found: dict[Key, Value]) -> dict[Key, Value]:
        """The entries of all processes in one dict."""
        return found if self.count == 1 else dict(gather_object(list(found.items())))

    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over processes. The losses are already divided by the global denominator."""
        gradients: list[Tensor] = []
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        if self.count > 1:
            flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
            sums = flat.split([gradient.numel() for gradient in gradients])
            for gradient, summed in zip(gradients, sums, strict=True):
                gradient.copy_(summed.view_as(gradient))
