"""How several processes share the forward and backward passes of an iteration.

Every process holds all completions of the iteration, and calls the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

Batches = list[list[int]]


class Processes:
    """sharded: the base is split over the processes, so that all of them must run it equally often."""

    def __init__(self, accelerator: Accelerator, sharded: bool) -> None:
        self.accelerator, self.sharded = accelerator, sharded
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def rank_share(self, batches: Batches) -> Batches:
        """The micro-batches of this process: the same ones whenever they are asked for."""
        return batches[self.rank :: self.count]

    def padding(self, batches: Batches) -> Batches:
        """Dummy micro-batches, at most one, that keep collectives in step; their results are discarded."""
        missing = self.sharded and len(self.rank_share(batches)) < len(batches[:: self.count])
        return batches[:1] if missing else []

    def gather(self, found: dict) -> dict:
        """The entries of all processes."""
        return found if self.count == 1 else dict(gather_object(list(found.items())))

    def share_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over processes. The losses are already divided by the global denominator."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.count > 1:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "sum")
            for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(grad.view_as(p))
