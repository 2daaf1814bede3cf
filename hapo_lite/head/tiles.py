"""Tiles [n, v] of tokens times vocabulary, in buffers that are allocated once, and the steps on one tile."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.head.logits import LogitForm
from hapo_lite.head.product import Product, product_beside
from hapo_lite.head.shape import tile_shape
from hapo_lite.head.softmax import Folded, Softmax


@functools.cache
def fold_kernel(device: str) -> Callable[[Softmax, Tensor, Tensor, Tensor], Folded] | None:
    """The fold as one Triton kernel where Triton works for that type of device; None leaves it to `Softmax.fold`.

    Triton compiles at a kernel's first launch, and without a C compiler or Python's headers that fails there. A small
    launch finds out. A warning says why the kernel is not used, unless Triton is not installed.
    """
    if device != "cuda":
        return None
    try:
        from hapo_lite.head.triton import fold, try_fold
    except ImportError:
        return None
    try:
        try_fold(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"Triton cannot compile here ({reason}), so the head's softmax runs as several operators of torch, which "
            "is slower; Triton needs a C compiler and Python's headers",
            stacklevel=2,
        )
        return None
    return fold


@dataclass(frozen=True)
class Tokens:
    """hidden: [N, D]; targets: [N]; inverse: 1 / T of each token [N], in the dtype of the logits.

    unscaled: whether every T is 1.
    """

    hidden: Tensor
    targets: Tensor
    inverse: Tensor
    unscaled: bool

    def rows(self, part: slice) -> Tokens:
        return Tokens(self.hidden[part], self.targets[part], self.inverse[part], self.unscaled)


@dataclass(frozen=True)
class Places:
    """Where each token's target lies in one tile. column: [n], 0 where it lies in another tile; inside: bool [n]."""

    column: Tensor
    inside: Tensor

    @classmethod
    def of(cls, targets: Tensor, columns: slice) -> Places:
        inside = (targets >= columns.start) & (targets < columns.stop)
        return cls(torch.where(inside, targets - columns.start, 0), inside)

    def put(self, tile: Tensor, values: Tensor) -> None:
        """Set the target's entry of `tile` [n, v] to values [n] in the rows whose target lies inside."""
        index = self.column[:, None]
        tile.scatter_(1, index, torch.where(self.inside[:, None], values[:, None], tile.gather(1, index)))


class Tiles:
    """The buffers of a tile, made for `tokens` and the logits of `form`, and the steps that work in them.

    product: how the products are formed; their result, and every sum over tiles, is in `tokens.inverse`'s dtype.
    """

    def __init__(self, tokens: Tokens, form: LogitForm) -> None:
        hidden, device = tokens.hidden, tokens.hidden.device.type
        dtype = tokens.inverse.dtype
        self.form = form
        self.product = Product.of(form.vocabulary.dtype, dtype, device)
        count, width = hidden.shape
        self._rows, self._columns = tile_shape(device, count, width, form.vocabulary.shape[0])
        self._product_is_logits = form.plain and tokens.unscaled
        self._kernel = fold_kernel(device)
        size = self._rows * self._columns
        self._logits = hidden.new_empty(size, dtype=dtype)
        self._exponentials = hidden.new_empty(size, dtype=self.product.factors if self._kernel else dtype)
        self._slope = None if form.soft_cap is None else hidden.new_empty(size, dtype=dtype)
        if self.product.rounds:
            self._rounded = hidden.new_empty(size, dtype=self.product.factors)
            self._rounded_sum = hidden.new_empty(self._rows * width, dtype=self.product.factors)

    def token_slices(self, count: int) -> list[slice]:
        return [slice(start, min(start + self._rows, count)) for start in range(0, count, self._rows)]

    def vocabulary_slices(self) -> list[slice]:
        total = self.form.vocabulary.shape[0]
        return [slice(start, min(start + self._columns, total)) for start in range(0, total, self._columns)]

    def weight(self, columns: slice) -> Tensor:
        """Rows of W [v, D], in the dtype of the product's factors."""
        return self.form.vocabulary[columns].to(self.product.factors)

    def first_reference(self, states: Tensor, product: Tensor) -> Tensor:
        """The largest of the target's product [n] and some others: what rounding is relative to in the first tile.

        Where the target is unlikely, its own product would be a poor reference.
        """
        if not self.product.rounds:
            return product
        tile = self.weight(slice(0, min(512, self._columns)))
        first = self._rounded[: states.shape[0] * tile.shape[0]].view(states.shape[0], -1)
        return torch.maximum(product, torch.mm(states, tile.T, out=first).amax(dim=1).to(product.dtype))

    def next_reference(self, reference: Tensor, top: Tensor, inverse: Tensor) -> Tensor:
        """The reference for the next tile, after one whose largest logit so far is `top` [n]."""
        if not self.product.rounds or self.form.bias is not None or self.form.soft_cap is not None:
            return reference
        return torch.maximum(reference, top / (self.form.logit_scale * inverse))

    def logits(
        self, states: Tensor, tile: Tensor, columns: slice, reference: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """z [n, v] and its slope, as `LogitForm.transform` has them. states: [n, D], tile: [v, D], as factors.

        reference: [n], near the largest product. Where the product is stored in 16 bits, it is rounded relative to
        the reference.
        """
        n, v = states.shape[0], tile.shape[0]
        out = self._logits[: n * v].view(n, v)
        if self.product.rounds:
            product_beside(reference, states, tile, self._rounded[: n * v].view(n, v), out)
        elif self.product.narrow:
            torch.mm(states, tile.T, out_dtype=self.product.result, out=out)
        else:
            torch.mm(states, tile.T, out=out)
        if self._product_is_logits:
            return out, None
        slope = None if self._slope is None else self._slope[: n * v].view(n, v)
        return self.form.transform(out, columns, inverse, slope)

    def fold(self, softmax: Softmax, logits: Tensor, places: Places) -> Folded:
        """`Softmax.fold`, with the entry of each target then set to 0 in both tiles that it returns."""
        exponentials = self._exponentials[: logits.numel()].view_as(logits)
        if self._kernel:
            return self._kernel(softmax, logits, exponentials, torch.where(places.inside, places.column, -1))
        folded = softmax.fold(logits, exponentials)
        for tile in (folded.products, folded.exponentials):
            places.put(tile, torch.zeros_like(folded.factor))
        return folded

    def add_product(self, total: Tensor, left: Tensor, tile: Tensor) -> None:
        """total [n, D] += left [n, v] @ tile [v, D]; the sum over tiles keeps the dtype of `total`."""
        n, v = left.shape
        if not self.product.narrow:
            total.addmm_(left, tile)
        elif self.product.rounds:
            product = self._rounded_sum[: n * total.shape[1]].view(n, -1)
            torch.mm(self._rounded[: n * v].view(n, v).copy_(left), tile, out=product)
            total.add_(product)
        else:
            torch.addmm(total, left.to(tile.dtype), tile, out_dtype=total.dtype, out=total)
