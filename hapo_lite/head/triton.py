"""The fold of a tile into an online softmax as one Triton kernel: each logit is read once and written once.

The sums are those of `Softmax.fold`, which runs where there is no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hapo_lite.head.softmax import Folded, Softmax


@triton.jit  # type: ignore[untyped-decorator]
def _fold(  # type: ignore[no-untyped-def]
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


def fold(softmax: Softmax, logits: Tensor, exponentials: Tensor, place: Tensor) -> Folded:
    """`Softmax.fold` of a contiguous tile `logits` [n, v], which is overwritten.

    exponentials: a contiguous buffer [n, v] of any floating dtype; place: [n], the column whose entry is then set to 0
    in both tiles of the result, -1 for none.
    """
    n, v = logits.shape
    old = (softmax.top, softmax.others, softmax.weighted)
    new = Softmax(*(torch.empty_like(statistic) for statistic in old))
    _fold[(n,)](
        logits,
        exponentials,
        place,
        *old,
        new.top,
        new.others,
        new.weighted,
        v,
        BLOCK=triton.next_power_of_2(v),
        num_warps=8,
    )
    rise = new.top - softmax.top
    return Folded(new, rise, rise.neg().exp_(), exponentials, products=logits)


def try_fold(device: str) -> None:
    """Fold one small tile, to see that the kernel compiles and runs on that type of device. Raises what fails."""
    softmax = Softmax.empty(torch.zeros(1, device=device))
    logits = torch.zeros(1, 16, device=device)
    folded = fold(softmax, logits, torch.empty_like(logits), torch.full((1,), -1, device=device))
    float(folded.softmax.others)  # waits for the launch
