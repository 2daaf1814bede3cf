"""The language-model head without N x V logits: hidden states to log-probability and entropy, with an exact gradient.

Axes: N tokens, D hidden, V vocabulary. Each tile of tokens reads the vocabulary once, tile by tile, as attention with
query h and keys = values = W: an online softmax keeps, for each token, the largest logit, two sums for the entropy,
and, when a gradient is wanted, the running row of

    d logp / d hidden = (W[y] - softmax(z) W) / T

in fp32. The loss reaches the hidden states only through logp, so backward is one scaling of those rows: 4NDV flops for
both directions, no logits kept, and none computed twice unless the head itself is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILES = {"cpu": (512, 4096), "cuda": (2048, 4096)}
"""Tokens x vocabulary entries of one tile, by device type. In fp32 a CPU tile is 8 MiB, to stay in a last-level cache;
two such tiles are held, and for products in bf16 one tile and one [tokens, D] product in that dtype."""


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each next-token distribution at `temperature`.

    hidden: [N, D]; weight: [V, D]; targets: [N] integer ids; temperature: a number, or [N] for one a token. Returns
    logp [N], differentiable in `hidden` (and in `weight` where it requires a gradient), and entropy [N], detached;
    nats; fp32, or fp64 for fp64 input. Under `torch.no_grad` the product that makes the gradient is left out.
    Raises ValueError on shapes that do not fit, an id outside [0, V) or a temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}], one a token")
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    temperature = torch.as_tensor(temperature, dtype=dtype, device=hidden.device)
    if temperature.shape not in (hidden.shape[:1], ()):
        raise ValueError(f"temperature {tuple(temperature.shape)} must be a number or [{hidden.shape[0]}], one a token")
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be positive, not {float(temperature.min())}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets lie in [{int(targets.min())}, {int(targets.max())}], outside the vocabulary of {weight.shape[0]}"
        )
    scale = temperature.reciprocal().expand(hidden.shape[0])
    if not torch.is_grad_enabled():
        # A custom function is told that its input wants a gradient even where none is recorded.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return _Head.apply(hidden, weight, targets, scale)


def logits_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp, entropy) over the last axis: [..., V] -> [...], [...]; nats.

    With m the largest logit and s the sum of exp(z - m) over all other entries,
    H = log1p(s) + sum(exp(z - m) (m - z)) / (1 + s). Every term is non-negative, so nothing cancels: the relative error
    stays near 1e-7 in fp32 where logsumexp(z) - sum(p z) has lost every digit.
    """
    softmax = _Softmax(logits[..., 0].reshape(-1))
    # A masked logit is -inf; a finite distance keeps 0 * inf out of the entropy.
    rows = logits.reshape(-1, logits.shape[-1]).clamp(min=torch.finfo(logits.dtype).min / 4)
    softmax.fold(rows, torch.empty_like(rows))
    return softmax.logsumexp().view(logits.shape[:-1]), softmax.entropy().view(logits.shape[:-1])


class _Softmax:
    """A softmax over [n, V] that arrives in tiles of the vocabulary.

    top: the largest logit m so far; others: sum of exp(z - m) over every entry but that one; weighted: sum of
    exp(z - m) (m - z). All [n]; `total` = 1 + others.
    """

    def __init__(self, like: Tensor):
        # No entry yet: finite, so that no inf - inf arises, and far enough below any logit that its exponential is 0.
        self.top = torch.full_like(like, torch.finfo(like.dtype).min / 2)
        self.others = torch.zeros_like(like)
        self.weighted = torch.zeros_like(like)

    def fold(self, logits: Tensor, exponentials: Tensor) -> Tensor:
        """Take in a tile [n, v]: `exponentials` becomes exp(z - m) with the new m, `logits` is used up. Returns the
        factor [n] that turns sums over earlier tiles into sums relative to the new m."""
        tile_top, where = _max(logits)
        top = torch.maximum(self.top, tile_top)
        rise = top - self.top
        factor = rise.neg().exp_()
        distance = torch.sub(top[:, None], logits, out=logits)
        torch.neg(distance, out=exponentials).exp_()
        exponentials.scatter_(1, where, 0.0)
        tile_others = exponentials.sum(dim=1)
        # The smaller of the two tops is from now on one of the others.
        second = (self.top - tile_top).abs_().neg_().exp_()
        tile_share = (tile_top - top).exp_()
        exponentials.scatter_(1, where, tile_share[:, None])
        tile_weighted = distance.mul_(exponentials).sum(dim=1)
        self.weighted = factor * (self.weighted + rise * (1.0 + self.others)) + tile_weighted
        self.others = factor * self.others + tile_others + second
        self.top = top
        return factor

    @property
    def total(self) -> Tensor:
        return 1.0 + self.others

    def logsumexp(self) -> Tensor:
        return self.top + self.others.log1p()

    def entropy(self) -> Tensor:
        return self.others.log1p() + self.weighted / self.total


def _max(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest entry [n] of each row of [n, v] and its place [n, 1].

    In two steps, the vectorised maximum of blocks and the place within one of them: a maximum with its index is not
    vectorised on CPUs.
    """
    n, v = rows.shape
    if v % 64 or not rows.is_contiguous():
        top, where = rows.max(dim=1, keepdim=True)
        return top.squeeze(1), where
    blocks = rows.view(n, v // 64, 64)
    block = blocks.amax(dim=2).argmax(dim=1)
    top, inside = blocks[torch.arange(n, device=rows.device), block].max(dim=1)
    return top, (block * 64 + inside)[:, None]


class _Tiles:
    """Logits of [n] tokens, a tile of the vocabulary at a time, in buffers that are allocated once."""

    def __init__(self, hidden: Tensor, weight: Tensor, scale: Tensor):
        dtype = scale.dtype
        rows, columns = TILES.get(hidden.device.type, TILES["cuda"])
        self.rows, self.columns = min(rows, max(1, hidden.shape[0])), min(columns, weight.shape[0])
        self.weight, self.dtype = weight, dtype
        self._scaled = bool((scale != 1.0).any())
        # fp16 products are slow or absent on CPUs, and a mixed pair has no product: such weights are cast tile by tile.
        native = (dtype, torch.bfloat16) if weight.device.type == "cpu" else (dtype, torch.bfloat16, torch.float16)
        self.product_dtype = weight.dtype if weight.dtype in native else dtype
        self.rounds = self.product_dtype != dtype
        # CUDA multiplies bf16 into fp32, which comes in a tensor of its own.
        self._widens = self.rounds and hidden.is_cuda
        size = self.rows * self.columns
        self._exponentials = hidden.new_empty(size, dtype=dtype)
        if not self._widens:
            self._logits = hidden.new_empty(size, dtype=dtype)
        if self.rounds and not self._widens:
            self._narrow = hidden.new_empty(size, dtype=self.product_dtype)
            self._product = hidden.new_empty(self.rows * hidden.shape[1], dtype=self.product_dtype)

    def token_slices(self, count: int) -> list[slice]:
        return [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def vocabulary_slices(self) -> list[slice]:
        total = self.weight.shape[0]
        return [slice(start, min(start + self.columns, total)) for start in range(0, total, self.columns)]

    def weight_tile(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.product_dtype)

    def logits(self, hidden: Tensor, tile: Tensor, reference: Tensor, scale: Tensor) -> Tensor:
        """z / T [n, v] of `hidden` [n, D], already in the dtype of the products.

        A product that is stored in bf16 is rounded then. `reference` [n], near the largest z, is subtracted before
        that, so that the likely entries, which lie close to it, keep small absolute errors.
        """
        n, v = hidden.shape[0], tile.shape[0]
        if self._widens:
            out = torch.mm(hidden, tile.T, out_dtype=self.dtype)
        else:
            out = self._logits[: n * v].view(n, v)
            if self.rounds:
                # Rounded first: what is added back must be what was subtracted.
                reference = reference.to(self.product_dtype)[:, None]
                narrow = self._narrow[: n * v].view(n, v).copy_(reference.neg())
                torch.addmm(narrow, hidden, tile.T, out=narrow)
                torch.add(narrow, reference.to(self.dtype), out=out)
            else:
                torch.mm(hidden, tile.T, out=out)
        return out.mul_(scale[:, None]) if self._scaled else out

    def exponentials(self, n: int, v: int) -> Tensor:
        return self._exponentials[: n * v].view(n, v)

    def add_product(self, total: Tensor, left: Tensor, tile: Tensor) -> None:
        """total [n, D] += left [n, v] @ tile [v, D]; the sum over tiles stays in `dtype`."""
        n, v = left.shape
        if not self.rounds:
            total.addmm_(left, tile)
        elif self._widens:
            total.add_(torch.mm(left.to(tile.dtype), tile, out_dtype=self.dtype))
        else:
            product = self._product[: n * total.shape[1]].view(n, -1)
            torch.mm(self._narrow[: n * v].view(n, v).copy_(left), tile, out=product)
            total.add_(product)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = scale.dtype
        tiles = _Tiles(hidden, weight, scale)
        logp, entropy, normaliser = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
        jacobian = hidden.new_zeros(hidden.shape, dtype=dtype) if wants_hidden else None
        for rows in tiles.token_slices(hidden.shape[0]):
            states, factor = hidden[rows].to(tiles.product_dtype), scale[rows]
            target_rows = weight[targets[rows]].to(dtype)
            target_logit = (hidden[rows].to(dtype) * target_rows).sum(dim=1)
            softmax = _Softmax(factor)
            row = jacobian[rows] if wants_hidden else None
            for columns in tiles.vocabulary_slices():
                tile = tiles.weight_tile(columns)
                logits = tiles.logits(states, tile, target_logit, factor)
                place, inside = _place(targets[rows], columns)
                # The target's own logit is known without rounding.
                _put(logits, place, inside, target_logit * factor)
                exponentials = tiles.exponentials(*logits.shape)
                earlier = softmax.fold(logits, exponentials)
                if wants_hidden:
                    # Without the target, whose share 1 - p(y) comes from `others`: near p(y) = 1 the row would cancel.
                    _put(exponentials, place, inside, torch.zeros_like(factor))
                    tiles.add_product(row.mul_(earlier[:, None]), exponentials, tile)
            scaled = target_logit * factor
            logp[rows] = (scaled - softmax.top) - softmax.others.log1p()
            entropy[rows] = softmax.entropy()
            normaliser[rows] = softmax.logsumexp()
            if wants_hidden:
                total = softmax.total
                share = (scaled - softmax.top).exp_()
                rest = torch.where(share == 1.0, softmax.others, total - share) / total
                row.mul_((factor / total).neg_()[:, None]).addcmul_((rest * factor)[:, None], target_rows)
        ctx.wants_weight, ctx.hidden_dtype = wants_weight, hidden.dtype
        ctx.save_for_backward(jacobian, *((hidden, weight, targets, scale, normaliser) if wants_weight else ()))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp: Tensor, _: Tensor):
        jacobian, *rest = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if jacobian is not None:
            grad_hidden = (grad_logp[:, None] * jacobian).to(ctx.hidden_dtype)
        if ctx.wants_weight:
            grad_weight = _weight_gradient(grad_logp, *rest)
        return grad_hidden, grad_weight, None, None


def _weight_gradient(grad_logp: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, lse: Tensor):
    """[V, D]: the sum over tokens of g (onehot(y) - p) h / T, with p recomputed from the saved logsumexp [N]."""
    tiles = _Tiles(hidden, weight, scale)
    gradient = torch.zeros_like(weight)
    for columns in tiles.vocabulary_slices():
        tile = tiles.weight_tile(columns)
        total = torch.zeros_like(tile, dtype=scale.dtype)
        for rows in tiles.token_slices(hidden.shape[0]):
            states, factor = hidden[rows].to(tiles.product_dtype), scale[rows]
            logits = tiles.logits(states, tile, lse[rows] / factor, factor)
            probability = logits.sub_(lse[rows, None]).exp_()
            place, inside = _place(targets[rows], columns)
            slope = probability.neg_()
            slope.scatter_add_(1, place[:, None], inside.to(slope.dtype)[:, None])
            slope.mul_((grad_logp[rows] * factor)[:, None])
            total.addmm_(slope.T, hidden[rows].to(scale.dtype))
        gradient[columns] = total.to(weight.dtype)
    return gradient


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where each target lies in a tile of the vocabulary [n] (0 where it does not), and whether it does [n]."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return torch.where(inside, targets - columns.start, 0), inside


def _put(tile: Tensor, place: Tensor, inside: Tensor, values: Tensor) -> None:
    """tile[i, place[i]] = values[i] for the rows that are `inside`."""
    index = place[:, None]
    tile.scatter_(1, index, torch.where(inside[:, None], values[:, None], tile.gather(1, index)))
