"""The memory of a card that tensors can use, and whether a 4-bit base is unpacked there."""

from __future__ import annotations

import psutil
import torch

from hapo_lite.errors import UserError
from hapo_lite.model.unpacked import Unpacking
from hapo_lite.recipe import Recipe
from hapo_lite.train.memory.predict import Predictor, unpacking

CONTEXT = 0.6 * 2**30
"""Bytes that CUDA and its libraries hold on a card before any tensor; an assumption, not yet measured on a GPU."""
FRAGMENTS = 0.06
"""Share of a card that the allocator's gaps take; an assumption too."""


def usable(card: int) -> int:
    """Bytes of tensors that fit on a card of `card` bytes."""
    return int((card - CONTEXT) * (1.0 - FRAGMENTS))


def room_of(device: torch.device) -> int:
    """Bytes of tensors that fit on this machine's `device`: of a whole card, or what is available in main memory."""
    if device.type == "cuda":
        return usable(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().available


def unpacks(recipe: Recipe, device: torch.device) -> Unpacking:
    """Whether a run of `recipe` on `device` unpacks its 4-bit base.

    A recipe that leaves it open leaves it to each rollout on a CPU. On a GPU the prediction decides once for the whole
    run, since packed and unpacked kernels round differently: by the whole card's memory, so that a resumed run decides
    the same. Another program may hold a part of that memory; the copy is then given up where memory runs out.
    A base whose memory cannot be predicted stays packed. A model that cannot be loaded is no error here.
    """
    wanted = unpacking(recipe)
    if not wanted.left_open or device.type != "cuda":
        return wanted
    room = room_of(device)
    try:
        fits = "unpacked base" in Predictor(recipe, "cuda").stages(room=room)[0].parts
    except UserError:
        # Such as a model that brings its own code, which the prediction never runs though the recipe may trust it. A
        # real mistake in the recipe is told by whoever loads the model.
        fits = False
    return Unpacking.DECIDED if fits else Unpacking.NEVER
