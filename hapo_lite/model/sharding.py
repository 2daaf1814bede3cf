"""FSDP: each process keeps a part of the frozen base's layers, and the adapter whole.

torch's fully_shard gathers a layer as it is run, in all processes at once, so that they have to run equally often
(`Processes.idle`). The adapter is left out: its gradients are shared as without FSDP. Sampling runs as often as each
process has tokens to write, and a gather for every token would send the base over the wire again and again: there the
base is gathered once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hapo_lite.errors import UserError
from hapo_lite.model.oom import is_shortage
from hapo_lite.model.policy import Policy

SWITCH = "ACCELERATE_USE_FSDP"
"""Set by `accelerate launch` for a configuration of type FSDP."""


def take_switch() -> bool:
    """Whether FSDP was asked for. It is switched off for accelerate and transformers, which would split all weights."""
    return os.environ.pop(SWITCH, "false").lower() == "true"


def shard_base(policy: Policy) -> tuple[int, int]:
    """Split every decoder layer's frozen weights over the processes. Embeddings, head and adapter stay whole.

    Returns the model's bytes in this process, before and after.
    """
    before = local_bytes(policy)
    decoder = policy.model.get_base_model().get_decoder()
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


def sharded_modules(policy: Policy) -> list[nn.Module]:
    return [module for module in policy.model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def whole_base(policy: Policy) -> Iterator[None]:
    """Within, each process has the whole base and may run it as often as it likes. All have to enter together."""
    modules = sharded_modules(policy)
    try:
        try:
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            # The others wait for this process's part, so there is no going on.
            raise UserError(
                "the whole base does not fit into this card for sampling: FSDP saves no memory there"
            ) from error
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
