"""How several processes share an iteration's forward and backward passes, and what they found.

Every process holds the whole iteration's completions and is asked the same questions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

Batches = list[list[int]]


class Processes:
    """sharded: the base is split over the processes, which then have to run it equally often."""

    def __init__(self, accelerator: Accelerator, sharded: bool) -> None:
        self.accelerator, self.sharded = accelerator, sharded
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def mine(self, batches: Batches) -> Batches:
        """This process's share of some micro-batches: the same share whenever it is asked."""
        return batches[self.rank :: self.count]

    def idle(self, batches: Batches) -> Batches:
        """What this process runs after its share for the others' sake, to be forgotten: at most one micro-batch."""
        missing = self.sharded and len(self.mine(batches)) < len(batches[:: self.count])
        return batches[:1] if missing else []

    def everyones(self, found: dict) -> dict:
        """What all processes found."""
        return found if self.count == 1 else dict(gather_object(list(found.items())))

    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum them over processes. The losses are already divided by the global denominator."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.count > 1:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "sum")
            for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(grad.view_as(p))
