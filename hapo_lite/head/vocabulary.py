"""Rows of the head's weight W [V, D], which may be a plain tensor or packed in 4 bits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Vocabulary(Protocol):
    """A weight [V, D]; indexing gives rows [v, D] in `dtype`, without a gradient."""

    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor: ...


def open_vocabulary(weight: Tensor) -> Vocabulary:
    """The rows of `weight`: of any floating dtype, or a 4-bit parameter of bitsandbytes.

    Raises ValueError for a 4-bit parameter whose rows cannot be read one by one.
    """
    state = getattr(weight, "quant_state", None)
    return DenseVocabulary(weight) if state is None else FourBitVocabulary(weight, state)


class DenseVocabulary:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self.shape = weight.shape
        self.dtype = weight.dtype

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._weight[rows]


class FourBitVocabulary:
    """A 4-bit parameter of bitsandbytes with its `QuantState`; shape and dtype are those of the unpacked weight."""

    def __init__(self, weight: Tensor, state: Any) -> None:
        from bitsandbytes.functional import dequantize_blockwise

        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("this 4-bit weight was repacked for inference on a CPU; its rows cannot be read any more")
        if len(state.shape) != 2 or state.shape[1] % state.blocksize:
            raise ValueError(f"a 4-bit weight {tuple(state.shape)} needs rows of whole blocks of {state.blocksize}")
        self.shape: torch.Size = state.shape
        self.dtype: torch.dtype = state.dtype
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        self._packed = weight.detach().view(self.shape[0], -1)
        self._absmax = absmax.view(self.shape[0], -1)
        self._state = state

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        from bitsandbytes import functional

        packed, absmax = self._packed[rows], self._absmax[rows]
        if not len(packed):
            return torch.empty(0, self.shape[1], dtype=self.dtype, device=packed.device)
        state = functional.QuantState(  # type: ignore[no-untyped-call]
            absmax=absmax.reshape(-1),
            shape=torch.Size((len(packed), self.shape[1])),
            code=self._state.code,
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
            dtype=self.dtype,
        )
        return functional.dequantize_4bit(packed.reshape(-1, 1), state)
