"""Counts the bytes of live tensors while torch allocates and frees them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_OPERATORS = 200_000
"""Operators of a stage, at most. A model of 80 layers has half as many."""


class TooManyOperators(RuntimeError):
    """A stage has more operators than layers explain."""


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors made inside it. now: those alive; peak: the maximum so far.

    known: tensors from before, such as weights. Their storages and views of them do not count. Tensors without data
    count as well. Memory that an operator allocates and frees internally is not seen. An operator beyond MOST_OPERATORS
    raises TooManyOperators.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._operators = 0
        self._seen: dict[int, weakref.ref | torch.UntypedStorage] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = storage

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and count the storages of its results."""
        self._operators += 1
        if self._operators > MOST_OPERATORS:
            raise TooManyOperators(f"more than {MOST_OPERATORS:,} operators, as a loop over tokens has")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: weakref.ref) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, freed)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and the scales that bitsandbytes keeps beside the data of its 4-bit parameters."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        scales = getattr(parameter, "quant_state", None)
        scales_of_scales = getattr(scales, "state2", None)
        for state in (scales, scales_of_scales):
            if state is not None:
                found += [t for t in (state.absmax, state.code, getattr(state, "offset", None)) if t is not None]
    return found


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
