"""A dense copy of a 4-bit base for as long as it is only read: without it, each layer is unpacked at every step.

The copy holds what bitsandbytes unpacks, in the dtype that the layer computes in. On a CPU its products are the packed
layer's to the last bit; on a GPU, where bitsandbytes has kernels of its own for few rows, they are the trainer's.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from hapo_lite.errors import UserError
from hapo_lite.model.oom import is_shortage


class UnpackedBase:
    """Makes the copy layer by layer as the layers are first called, and drops it at the end of the outermost `held`.

    wanted: True makes it, False never does; None does where twice the memory that it takes is free when `held` begins.
    """

    def __init__(self, model: nn.Module, wanted: bool | None) -> None:
        self.wanted = wanted
        self._layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        self._holders, self._lock = 0, threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the whole copy."""
        return sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in self._layers)

    @property
    def fits(self) -> bool:
        """Whether twice the copy's bytes are free: as much again is left for caches."""
        if not self._layers:
            return False
        device = self._layers[0].weight.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return 2 * self.size <= free

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, the layers use the copy. It may be entered again inside, and by several threads.

        Raises UserError if it is wanted and memory runs out while it is made.
        """
        with self._lock:
            if self._holders == 0 and (self.fits if self.wanted is None else self.wanted):
                for layer in self._layers:
                    layer.forward = _Dense(layer, self)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self.drop()

    def drop(self) -> None:
        """Give the memory back; the layers use their packed weights again."""
        for layer in self._layers:
            vars(layer).pop("forward", None)


class _Dense:
    """The forward of a `Linear4bit`, as bitsandbytes has it, but for a weight that is unpacked once."""

    def __init__(self, layer: Linear4bit, owner: UnpackedBase) -> None:
        self.layer, self.owner = layer, owner
        self.weight: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.compute_type_is_set:
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        dtype = layer.compute_dtype or x.dtype
        if self.weight is None or self.weight.dtype != dtype:
            try:
                self.weight = unpack(layer, dtype)
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error):
                    raise
                if self.owner.wanted:
                    raise UserError(
                        f"rollout.unpacked_base = always takes {self.owner.size / 2**30:.3g} GiB, which are not free: "
                        "use auto or never"
                    ) from error
                self.owner.drop()
                return layer(x)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), self.weight, bias).to(x.dtype)


@torch.no_grad()
def unpack(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layer, [out, in], as bitsandbytes unpacks it for a product in `dtype`."""
    state = copy.copy(layer.weight.quant_state)
    state.dtype = dtype
    return dequantize_4bit(layer.weight, state)
