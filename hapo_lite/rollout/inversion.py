"""Drawing a token by inverting the cumulative distribution, with fp64 where it decides and fp32 elsewhere.

The sum over a vocabulary needs more than fp32, which loses the tail of 150,000 entries to rounding. fp64 on all of them
is slow on GPUs for consumers. A large vocabulary is therefore summed block by block: probabilities in fp32, their sums
over blocks in fp64, and the likeliest blocks again with exponentials in fp64. What fp32 leaves uncertain is 1e-7 of the
mass outside those blocks, which is small unless a row is nearly uniform. Inside the block that a random number falls
into, all is fp64.

Axes: B rows, V vocabulary, K blocks of BLOCK entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, LIKELY = 128, 32
"""Entries of a block, and the number of blocks whose exponentials are computed in fp64."""
LARGE = 2 * BLOCK * LIKELY
"""Vocabularies above this size are inverted block by block."""
BELOW_ONE = 1.0 - 2.0**-53


def draw_token(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token for each row: the ids, each with a probability above 0, and their log-probabilities in nats, fp32.

    scores: [B, V], unnormalised log-probabilities; uniform: [B], in [0, 1). Returns [B] each.
    """
    if scores.shape[1] > LARGE:
        return _by_blocks(scores, uniform)
    cumulative = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum_(dim=-1)
    ids = _first_above(cumulative, uniform.to(cumulative) * cumulative[:, -1])
    return ids, scores.gather(1, ids[:, None]).squeeze(1) - scores.logsumexp(dim=-1)


def _by_blocks(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    probability = torch.softmax(scores, dim=-1)
    mass = _block_sums(probability).double()
    likely = mass.topk(LIKELY, dim=-1).indices
    places = torch.arange(BLOCK, device=scores.device)
    exact = _weights(scores, likely, places).sum(dim=-1)
    # The likeliest blocks keep their part of the whole mass; their shares of that part become exact.
    mass.scatter_(1, likely, exact * (mass.gather(1, likely).sum(dim=-1) / exact.sum(dim=-1))[:, None])
    cumulative = mass.cumsum(dim=-1)
    total = cumulative[:, -1]
    threshold = uniform.to(cumulative) * total
    block = _first_above(cumulative, threshold)[:, None]
    own = mass.gather(1, block).squeeze(1)
    share = (threshold - cumulative.gather(1, block).squeeze(1)).div_(own).add_(1.0).clamp_(0.0, BELOW_ONE)
    inside = _weights(scores, block, places).squeeze(1).cumsum_(dim=-1)
    ids = block.squeeze(1) * BLOCK + _first_above(inside, share * inside[:, -1])
    return ids, (probability.gather(1, ids[:, None]).squeeze(1).double() / total).log().float()


def _block_sums(values: Tensor) -> Tensor:
    """Sums over blocks, [B, K]; the last block may be shorter."""
    whole = values.shape[1] // BLOCK * BLOCK
    sums = values[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)
    if whole == values.shape[1]:
        return sums
    return torch.cat([sums, values[:, whole:].sum(dim=-1, keepdim=True)], dim=1)


def _weights(scores: Tensor, blocks: Tensor, places: Tensor) -> Tensor:
    """exp(score - largest score in these blocks) of the blocks' entries: [B, k, BLOCK], fp64.

    blocks: [B, k]. places: 0 to BLOCK - 1.
    """
    size = scores.shape[1]
    columns = blocks[:, :, None] * BLOCK + places
    if size % BLOCK:
        picked = scores.gather(1, columns.clamp(max=size - 1).flatten(1)).view(columns.shape)
        picked = picked.masked_fill(columns >= size, float("-inf"))
    else:
        picked = scores.gather(1, columns.flatten(1)).view(columns.shape)
    wide = picked.double()
    return wide.sub_(wide.amax(dim=(1, 2), keepdim=True)).exp_()


def _first_above(cumulative: Tensor, threshold: Tensor) -> Tensor:
    """The first entry of each row, [B], at which `cumulative`, [B, n], exceeds `threshold`, [B].

    The cumulative distribution rises there, so the entry has a probability above 0.
    """
    found = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return found.clamp_max_(cumulative.shape[1] - 1)
