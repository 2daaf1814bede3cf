"""A dense copy of a 4-bit base. Without the copy, every layer is unpacked at every step, and twice in training.

The copy holds what bitsandbytes unpacks, in the layer's compute dtype. On a CPU its products equal the packed layer's
to the last bit, in the backward too. On a GPU bitsandbytes has other kernels for few rows, and the copy's products
equal the trainer's instead.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
import threading
from collections.abc import Iterator
from typing import cast

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from tqdm.auto import tqdm

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.oom import is_out_of_memory

BESIDE_CACHES, BESIDE_ACTIVATIONS = 0.5, 0.05
"""The largest share of the free memory that the copy may take: where the base is only read, and in an update, whose
activations may need nearly all that is free."""


class Unpacking(enum.Enum):
    """Whether the copy is made, and what becomes of it where memory runs out."""

    NEVER = "no copy"
    IF_FREE = "made if twice its bytes are free when it is needed; given up where memory runs out"
    DECIDED = "made, since a prediction says that it fits; given up where memory runs out"
    ALWAYS = "made, since the recipe asks for it; kept where memory runs out"

    @property
    def left_open(self) -> bool:
        """Whether the recipe asks neither for the copy nor for none."""
        return self in (Unpacking.IF_FREE, Unpacking.DECIDED)


class UnpackedBase:
    """Makes the copy layer by layer, each at its first call, and frees it at the end of the outermost `held`.

    wanted: whether it is made. given_up: whether memory ran out, so that the base stays packed.
    """

    def __init__(self, model: nn.Module, wanted: Unpacking) -> None:
        self.wanted = wanted
        self.given_up = False
        self._ran_short = False
        self._layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        self._holders, self._lock = 0, threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of the whole copy."""
        return sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in self._layers)

    def fits(self, share: float) -> bool:
        """Whether the copy takes at most that share of the memory that is free."""
        if not self._layers:
            return False
        device = self._layers[0].weight.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return self.size <= share * free

    @contextlib.contextmanager
    def held(self, in_update: bool = False) -> Iterator[None]:
        """A context within which the layers use the copy. It may be nested, and entered by several threads.

        in_update: the copy stands beside activations, so it has to be small beside what is free, `wanted` or not.
        A layer's first call raises UserError if `wanted` is ALWAYS and memory runs out while its copy is made.
        """
        with self._lock:
            if self._holders == 0 and self._makes(in_update):
                for layer in self._layers:
                    vars(layer)["forward"] = _Dense(layer, self)
            self._holders += 1
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self._ran_short |= self._in_use and is_out_of_memory(error)
            raise
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self.drop()

    def _makes(self, in_update: bool) -> bool:
        if self.wanted is Unpacking.NEVER:
            return False
        if in_update:
            return self.fits(BESIDE_ACTIVATIONS)
        return self.wanted is not Unpacking.IF_FREE or self.fits(BESIDE_CACHES)

    @property
    def _in_use(self) -> bool:
        return any("forward" in vars(layer) for layer in self._layers)

    @property
    def in_the_way(self) -> bool:
        """Whether memory ran out beside a copy that can be given up."""
        return self._ran_short and self.wanted.left_open

    def give_up(self) -> None:
        """Free the copy, and make none from now on. A copy that the recipe asks for stays."""
        if self.wanted.left_open:
            self.wanted, self.given_up = Unpacking.NEVER, True
            self.drop()

    def drop(self) -> None:
        """Free the copy; the layers use their packed weights again."""
        for layer in self._layers:
            vars(layer).pop("forward", None)


class _Dense:
    """The forward of a `Linear4bit` as bitsandbytes computes it, with a weight that is unpacked once."""

    def __init__(self, layer: Linear4bit, owner: UnpackedBase) -> None:
        self.layer, self.owner = layer, owner
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not layer.compute_type_is_set:
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        dtype = layer.compute_dtype or x.dtype
        if self.weight is None or self.weight.dtype != dtype:
            try:
                self.weight = unpack(layer, dtype)
                self.bias = None if layer.bias is None else layer.bias.to(dtype)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._refused(error)
                return layer(x)
        if x.dtype == dtype:
            return nn.functional.linear(x, self.weight, self.bias)
        return nn.functional.linear(x.to(dtype), self.weight, self.bias).to(x.dtype)

    def _refused(self, error: BaseException) -> None:
        """Give the copy up with a note, since this layer's does not fit. Raises UserError if the recipe asks for it."""
        owner = self.owner
        if owner.wanted is Unpacking.ALWAYS:
            raise UserError(
                f"rollout.unpacked_base = always takes {owner.size / 2**30:.3g} GiB, which are not free: "
                "use auto or never"
            ) from error
        if owner.wanted.left_open:  # else another thread has given it up
            owner.give_up()
            tqdm.write(
                f"note: memory ran out while the 4-bit base was unpacked ({first_line(error)}): it stays packed from "
                "now on, as with rollout.unpacked_base=never"
            )


@functools.singledispatch
@torch.no_grad()
def unpack(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layer, [out, in], as bitsandbytes unpacks it for a product in `dtype`.

    Dispatched by the layer's class: the stand-in without data, by which memory is counted, has a way of its own.
    """
    state = copy.copy(cast(Params4bit, layer.weight).quant_state)
    state.dtype = dtype
    return dequantize_4bit(layer.weight, state)
