"""Gradients of log-probability and entropy: rows of a Jacobian in the hidden states, and the sum over tokens in W."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.head.logits import LogitForm
from hapo_lite.head.softmax import Folded, Softmax
from hapo_lite.head.tiles import Places, Tiles, Tokens


@dataclass(frozen=True)
class Target:
    """The target y of each of n tokens, known without a pass over the vocabulary and without rounding.

    weight: W[y] [n, D]; product: h W[y] [n]; logit: z_y [n]; slope: its slope [n] as in `LogitForm.transform`, or None.
    """

    weight: Tensor
    product: Tensor
    logit: Tensor
    slope: Tensor | None

    @classmethod
    def of(cls, tokens: Tokens, form: LogitForm) -> Target:
        dtype = tokens.inverse.dtype
        weight = form.vocabulary[tokens.targets].to(dtype)
        product = torch.linalg.vecdot(tokens.hidden.to(dtype), weight)
        logit, slope = form.transform(product.clone()[:, None], tokens.targets, tokens.inverse)
        return cls(weight, product, logit.squeeze(1), None if slope is None else slope.squeeze(1))


@dataclass(frozen=True)
class Jacobian:
    """Rows [n, D] of d logp / d hidden and, or None, of d H / d hidden.

    While the vocabulary passes they are sums over the entries v other than the target y, with m the running maximum
    and s_v the slope of z_v:

        logp = sum exp(z_v - m) s_v W[v]        entropy = sum exp(z_v - m) (z_v - m) s_v W[v]

    The target's share is put in at the end: near p(y) = 1 the sum with it would cancel.
    """

    logp: Tensor
    entropy: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, dtype: torch.dtype, with_entropy: bool) -> Jacobian:
        logp = hidden.new_zeros(hidden.shape, dtype=dtype)
        return cls(logp, torch.zeros_like(logp) if with_entropy else None)

    def rows(self, part: slice) -> Jacobian:
        return Jacobian(self.logp[part], None if self.entropy is None else self.entropy[part])

    def add(self, tiles: Tiles, tile: Tensor, slope: Tensor | None, folded: Folded) -> None:
        """Take in a tile [v, D] of W, whose logits were folded; their slope [n, v], or None where it is 1."""
        factor = folded.factor[:, None]
        if self.entropy is not None:
            self.entropy.addcmul_(self.logp, folded.rise[:, None], value=-1).mul_(factor)
            tiles.add_product(self.entropy, _times(folded.products, slope), tile)
        self.logp.mul_(factor)
        tiles.add_product(self.logp, _times(folded.exponentials, slope), tile)

    def finish(self, softmax: Softmax, target: Target, step: Tensor) -> None:
        """Turn the sums over all tiles into the Jacobian. step: logit_scale / T [n], to which slopes are relative."""
        total = softmax.total
        below = target.logit - softmax.top
        share = below.exp()
        target_step = step if target.slope is None else step * target.slope
        scale = (step / total).neg_()[:, None]
        if self.entropy is not None:
            mean = softmax.weighted / total
            self.entropy.addcmul_(self.logp, mean[:, None]).mul_(scale)
            self.entropy.addcmul_((target_step * share / total * (-below - mean))[:, None], target.weight)
        # 1 - p(y); where y has the largest logit, the others' sum has digits that a difference would lose.
        rest = torch.where(share == 1.0, softmax.others, total - share) / total
        self.logp.mul_(scale).addcmul_((target_step * rest)[:, None], target.weight)


@dataclass(frozen=True)
class Distributions:
    """The next-token distribution of each token: p = exp(z - normaliser). normaliser, entropy: [N], nats."""

    normaliser: Tensor
    entropy: Tensor


def weight_gradient(
    weight: Tensor,
    form: LogitForm,
    tokens: Tokens,
    distributions: Distributions,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """[V, D], like `weight`: the sum over tokens of (g (onehot(y) - p) - g_H p (log p + H)) dz/d(product) h.

    g, g_H: the gradients [N] that reach log-probability and entropy; g_H is None where the entropy is detached.
    """
    tiles = Tiles(tokens, form)
    dtype = tokens.inverse.dtype
    gradient = torch.zeros_like(weight)
    for columns in tiles.vocabulary_slices():
        tile = tiles.weight(columns)
        total = torch.zeros_like(tile, dtype=dtype)
        for rows in tiles.token_slices(tokens.hidden.shape[0]):
            part = tokens.rows(rows)
            normaliser = distributions.normaliser[rows]
            step = form.logit_scale * part.inverse
            # Only rounding sees the reference: any value near the largest product will do.
            reference = normaliser / step
            states = part.hidden.to(tiles.product.factors)
            logits, slope = tiles.logits(states, tile, columns, reference, part.inverse)
            logp = logits.sub_(normaliser[:, None])
            force = logp.exp().mul_(-grad_logp[rows, None])
            if grad_entropy is not None:
                entropy = distributions.entropy[rows, None]
                force.sub_(logp.exp().mul_(logp + entropy).mul_(grad_entropy[rows, None]))
            places = Places.of(part.targets, columns)
            force.scatter_add_(1, places.column[:, None], (places.inside * grad_logp[rows])[:, None])
            force.mul_(step[:, None])
            total.addmm_(_times(force, slope).T, part.hidden.to(dtype))
        gradient[columns] = total.to(weight.dtype)
    return gradient


def _times(tile: Tensor, slope: Tensor | None) -> Tensor:
    """tile times slope, in the place of `tile`; a slope of None is 1."""
    return tile if slope is None else tile.mul_(slope)
