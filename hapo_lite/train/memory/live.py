"""How many bytes of tensors are alive, as torch makes and drops them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `now` are the bytes of the tensors made and still alive, and `peak` the most there were.

    known: tensors from before, such as weights; their storages count nothing, and neither do views of them. Works on
    tensors without data too. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref | torch.UntypedStorage] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: weakref.ref) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and what a 4-bit parameter of bitsandbytes keeps beside its own data."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        for state in (s := getattr(parameter, "quant_state", None), getattr(s, "state2", None)):
            if state is not None:
                found += [t for t in (state.absmax, state.code, getattr(state, "offset", None)) if t is not None]
    return found


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
