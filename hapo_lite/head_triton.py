"""The fold of a tile into an online softmax as one Triton kernel: each logit is read once and written once.

The same sums as `head._Softmax.fold`, which runs where there is no Triton. Axes: n tokens, v entries of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from hapo_lite.head import _Softmax


@triton.jit
def _fold(
    logits,
    exponentials,
    place,
    old_top,
    old_others,
    old_weighted,
    new_top,
    new_others,
    new_weighted,
    v,
    BLOCK: tl.constexpr,
):
    """One program a token; its v logits are held at once in BLOCK >= v lanes."""
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    valid = column < v
    offset = token * v + column
    z = tl.load(logits + offset, mask=valid, other=float("-inf"))
    tile_top = tl.max(z, axis=0)
    # The first of equal tops is the one that `others` leaves out.
    where = tl.min(tl.where(z == tile_top, column, BLOCK), axis=0)
    top = tl.load(old_top + token)
    others = tl.load(old_others + token)
    weighted = tl.load(old_weighted + token)
    risen = tl.maximum(top, tile_top)
    rise = risen - top
    factor = tl.exp(-rise)
    below = tl.where(valid, z - risen, 0.0)
    exponential = tl.where(valid, tl.exp(below), 0.0)
    product = exponential * below
    second = tl.exp(-tl.abs(top - tile_top))
    tl.store(new_top + token, risen)
    tl.store(new_weighted + token, factor * (weighted + rise * (1.0 + others)) - tl.sum(product, axis=0))
    tl.store(
        new_others + token,
        factor * others + tl.sum(tl.where(column == where, 0.0, exponential), axis=0) + second,
    )
    target = column == tl.load(place + token)
    tl.store(logits + offset, tl.where(target, 0.0, product), mask=valid)
    tl.store(exponentials + offset, tl.where(target, 0.0, exponential), mask=valid)


def fold(softmax: _Softmax, logits: Tensor, exponentials: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Take a contiguous tile [n, v] into `softmax`: `exponentials` becomes exp(z - m) in its own dtype, `logits`
    exp(z - m) (z - m), and both 0 at place [n] (-1: nowhere). Returns by how much m rose and exp(-rise), [n] each.
    """
    n, v = logits.shape
    old = softmax.top, softmax.others, softmax.weighted
    new = tuple(torch.empty_like(statistic) for statistic in old)
    _fold[(n,)](logits, exponentials, place, *old, *new, v, BLOCK=triton.next_power_of_2(v), num_warps=8)
    softmax.top, softmax.others, softmax.weighted = new
    rise = new[0] - old[0]
    return rise, rise.neg().exp_()
