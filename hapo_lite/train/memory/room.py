"""How much of a card tensors can take, and whether a base is unpacked there."""

from __future__ import annotations

import torch

from hapo_lite.recipe import Recipe
from hapo_lite.train.memory.predict import Predictor, unpacking

CONTEXT = 0.6 * 2**30
"""Bytes that CUDA and its libraries hold on a card before any tensor; an assumption, not yet measured on a GPU."""


FRAGMENTS = 0.06
"""Share of a card that an allocator's gaps take; likewise."""


def usable(card: int) -> int:
    """Bytes of tensors that fit on a card of `card` bytes."""
    return int((card - CONTEXT) * (1.0 - FRAGMENTS))


def unpacks(recipe: Recipe, device: torch.device) -> bool | None:
    """Whether a run of `recipe` on `device` unpacks its 4-bit base; None: asked anew when each rollout begins.

    On a GPU the prediction decides, once, since the packed kernels round otherwise.
    """
    wanted = unpacking(recipe)
    if wanted is not None or device.type != "cuda":
        return wanted
    room = usable(torch.cuda.get_device_properties(device).total_memory)
    return "unpacked base" in Predictor(recipe, "cuda").stages(room=room)[0].parts
