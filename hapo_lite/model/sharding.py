"""FSDP: each process keeps a part of the frozen base's layers, and the whole adapter.

torch's fully_shard gathers a layer when it runs, in all processes at once, so all processes must run the model equally
often (`Processes.padding`). The adapter is not split; its gradients are reduced as without FSDP. In sampling the
processes run the model as often as each has tokens to write, and a gather for every token would be slow, so the base is
gathered once for each rollout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hapo_lite.errors import UserError
from hapo_lite.model.decoder import decoder_of
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.model.policy import Policy

SWITCH = "ACCELERATE_USE_FSDP"
"""Set by `accelerate launch` for a configuration of type FSDP."""


def fsdp_requested() -> bool:
    """Whether `accelerate launch` asked for FSDP.

    The variable is removed, because accelerate and transformers would otherwise split all weights, the adapter's too.
    """
    return os.environ.pop(SWITCH, "false").lower() == "true"


def shard_base(policy: Policy) -> tuple[int, int]:
    """Split the frozen weights of every decoder layer over the processes. Embeddings, head and adapter stay whole.

    Returns the bytes of the model's weights in this process, before and after.
    """
    before = local_bytes(policy)
    decoder: Any = decoder_of(policy.base)
    adapter = set(policy.trainable().values())
    for layer in decoder.layers:
        fully_shard(layer, ignored_params=adapter & set(layer.parameters()))
    inside = {p for layer in decoder.layers for p in layer.parameters()}
    fully_shard(decoder, ignored_params=(set(decoder.parameters()) - inside) | adapter)
    return before, local_bytes(policy)


def local_bytes(policy: Policy) -> int:
    """Bytes of the model's weights that this process keeps."""
    kept = [p.to_local() if isinstance(p, DTensor) else p for p in policy.model.parameters()]
    return sum(p.numel() * p.element_size() for p in kept)


def sharded_modules(policy: Policy) -> list[FSDPModule]:
    """The modules whose weights are split: the decoder and its layers."""
    return [module for module in policy.model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole_base(policy: Policy) -> Iterator[None]:
    """A context within which each process has the whole base and may run it any number of times.

    A base that is not split stays as it is. All processes must enter the context together. Raises UserError if the
    whole base does not fit into memory.
    """
    modules = sharded_modules(policy)
    try:
        try:
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The other processes wait for this one's part of the weights, so the run cannot go on.
            raise UserError(
                "the whole base does not fit into this card for sampling: FSDP saves no memory there"
            ) from error
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
