"""The language-model head without N x V logits: hidden states to log-probability and entropy, with an exact gradient.

Axes: N tokens, D hidden, V vocabulary. Each tile of tokens reads the vocabulary once, tile by tile, as attention with
query h and keys = values = W: an online softmax keeps, for each token, the largest logit, two sums for the entropy,
and, when a gradient is wanted, the running row of

    d logp / d hidden = (W[y] - softmax(z) W) / T

in fp32. The loss reaches the hidden states only through logp, so backward is one scaling of those rows: 4NDV flops for
both directions, no logits kept, and none computed twice unless the head itself is trained. An entropy that takes part
in the loss costs one product more, for a row of its own: d H / d hidden = -sum_v p_v (log p_v + H) W[v] / T.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

TILES = {"cpu": (512, 4096), "cuda": (1024, 4096)}
"""Most tokens x vocabulary entries of one tile, by device type. In fp32 a CPU tile is 8 MiB, to stay in a last-level
cache."""
BUFFERS = {"cpu": 42e6, "cuda": 56e6}
"""Bytes that all buffers of a tile may take; a wide model gets smaller tiles. Less on a CPU, whose heap has gaps."""
PACKED = 16e6
"""Bytes of these for a bf16 tile of the weight, which a CPU's matrix library copies into an order of its own."""
LOG2_E = 1.0 / math.log(2.0)
MASKED = -1e30
"""What a logit of -inf counts as: its probability is 0, and no inf - inf or 0 * inf arises."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each next-token distribution at `temperature`.

    hidden: [N, D]; weight: [V, D], of any floating dtype or a 4-bit parameter of bitsandbytes; targets: [N] integer
    ids; temperature: a number, or [N] for one a token. The logits are z = cap(logit_scale (h W^T + bias)) / T with
    cap(x) = soft_cap tanh(x / soft_cap) where one is given, and bias [V] a constant; -inf in it masks an entry.

    Returns logp [N], differentiable in `hidden` (and in `weight` where it requires a gradient), and entropy [N],
    detached unless `entropy_gradient`; nats; fp32, or fp64 for fp64 input. Under `torch.no_grad` the product that makes
    the gradient is left out.
    Raises ValueError on shapes that do not fit, an id outside [0, V), or a temperature, scale or cap not above 0.
    """
    vocabulary = _vocabulary(weight)
    if hidden.dim() != 2 or len(vocabulary.shape) != 2 or hidden.shape[1] != vocabulary.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(vocabulary.shape)} must be [N, D] and [V, D]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}], one a token")
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    temperature = torch.as_tensor(temperature, dtype=dtype, device=hidden.device)
    if temperature.shape not in (hidden.shape[:1], ()):
        raise ValueError(f"temperature {tuple(temperature.shape)} must be a number or [{hidden.shape[0]}], one a token")
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature must be positive, not {float(temperature.min())}")
    size = vocabulary.shape[0]
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < size:
        raise ValueError(
            f"targets lie in [{int(targets.min())}, {int(targets.max())}], outside the vocabulary of {size}"
        )
    for name, value in (("logit_scale", logit_scale), ("soft_cap", soft_cap)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    if bias is not None:
        if bias.shape != (size,):
            raise ValueError(f"bias {tuple(bias.shape)} must be [{size}], one an entry of the vocabulary")
        if soft_cap is not None and bool(torch.isneginf(bias).any()):
            raise ValueError("a bias of -inf masks nothing under soft_cap, which bounds the logits")
        bias = bias.detach().to(dtype).clamp_min(MASKED)
    inverse = temperature.reciprocal().expand(hidden.shape[0])
    if not torch.is_grad_enabled():
        # A custom function is told that its input wants a gradient even where none is recorded.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        return _Head.apply(
            hidden, weight, targets, inverse, _Logits(vocabulary, bias, logit_scale, soft_cap), entropy_gradient
        )


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


@torch.no_grad()
def next_token_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h W^T + bias for a sampler, formed as `token_logprobs` forms it: [N, D], [V, D], [V] -> [N, V], no gradient.

    fp32, or fp64 for fp64 input. A plain product in bf16 is off by up to 0.06 where a logit is 30; here the likely
    entries of a row, which lie near its largest one, keep errors that are small beside 1.
    """
    vocabulary = _vocabulary(weight)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    factor = _product_dtype(vocabulary.dtype, dtype, hidden.device.type)
    states = hidden.to(factor)
    with torch.autocast(hidden.device.type, enabled=False):
        if not _rounds(factor, dtype, hidden.device.type):
            tile = vocabulary[:].to(factor)
            logits = states @ tile.T if factor == dtype else torch.mm(states, tile.T, out_dtype=dtype)
        else:
            logits = _logits_by_tiles(states, vocabulary, dtype)
    return logits if bias is None else logits.add_(bias)


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

    def fold(self, logits: Tensor, exponentials: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile [n, v]: `exponentials` becomes exp(z - m) with the new m, `logits` exp(z - m) (z - m).

        Returns by how much m rose, and the factor exp(-rise) that turns earlier sums into sums relative to the new m,
        [n] each.
        """
        tile_top, where = _max(logits)
        top = torch.maximum(self.top, tile_top)
        rise = top - self.top
        factor = rise.neg().exp_()
        below = logits.sub_(top[:, None])
        # Three times as fast as `exp` on a CPU, and off by 1e-6 where it is 1e-13.
        torch.mul(below, LOG2_E, out=exponentials).exp2_()
        exponentials.scatter_(1, where, 0.0)
        tile_others = exponentials.sum(dim=1)
        # The smaller of the two tops is from now on one of the others.
        second = (self.top - tile_top).abs_().neg_().exp_()
        exponentials.scatter_(1, where, (tile_top - top).exp_()[:, None])
        tile_weighted = below.mul_(exponentials).sum(dim=1)
        self.weighted = factor * (self.weighted + rise * (1.0 + self.others)) - tile_weighted
        self.others = factor * self.others + tile_others + second
        self.top = top
        return rise, factor

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


@functools.cache
def _fold_kernel(device: str) -> Callable | None:
    """The fold as one Triton kernel where there is Triton for the device, else None: `_Softmax.fold` in torch."""
    if device != "cuda":
        return None
    try:
        from hapo_lite.head_triton import fold
    except ImportError:
        return None
    return fold


class _Dense:
    """A weight [V, D]; indexing takes rows."""

    def __init__(self, weight: Tensor):
        self.shape, self.dtype, self._weight = weight.shape, weight.dtype, weight.detach()

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._weight[rows]


class _FourBit:
    """A 4-bit parameter of bitsandbytes, [V, D] once unpacked; indexing unpacks rows."""

    def __init__(self, weight: Tensor):
        from bitsandbytes import functional

        state = weight.quant_state
        self.shape, self.dtype = state.shape, state.dtype
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("this 4-bit weight was repacked for inference on a CPU; its rows cannot be read any more")
        if len(state.shape) != 2 or state.shape[1] % state.blocksize:
            raise ValueError(f"a 4-bit weight {tuple(state.shape)} needs rows of whole blocks of {state.blocksize}")
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        self._packed, self._absmax = weight.detach().view(self.shape[0], -1), absmax.view(self.shape[0], -1)
        self._state, self._functional = state, functional

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        packed, absmax = self._packed[rows], self._absmax[rows]
        if not len(packed):
            return torch.empty(0, self.shape[1], dtype=self.dtype, device=packed.device)
        state = self._functional.QuantState(
            absmax=absmax.reshape(-1),
            shape=torch.Size((len(packed), self.shape[1])),
            code=self._state.code,
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
            dtype=self.dtype,
        )
        return self._functional.dequantize_4bit(packed.reshape(-1, 1), state)


def _vocabulary(weight: Tensor) -> _Dense | _FourBit:
    return _FourBit(weight) if hasattr(weight, "quant_state") else _Dense(weight)


def _product_dtype(weight: torch.dtype, dtype: torch.dtype, device: str) -> torch.dtype:
    """What both factors of h W^T are cast to. dtype: of the result.

    fp16 products are slow or absent on CPUs, and a mixed pair has no product: such weights are cast tile by tile.
    """
    native = (dtype, torch.bfloat16) if device == "cpu" else (dtype, torch.bfloat16, torch.float16)
    return weight if weight in native else dtype


def _rounds(factor: torch.dtype, dtype: torch.dtype, device: str) -> bool:
    """Whether the product is stored in 16 bits. CUDA multiplies them into fp32."""
    return factor != dtype and device != "cuda"


def _product_beside(reference: Tensor, states: Tensor, tile: Tensor, rounded: Tensor, out: Tensor) -> None:
    """out [n, v] = states [n, D] @ tile^T [D, v], stored in 16 bits in between, relative to `reference` [n].

    Entries near the reference keep small absolute errors. rounded: a buffer [n, v] of the factors' dtype.
    """
    # Rounded first: what is added back must be what was subtracted.
    reference = reference.to(rounded.dtype)[:, None]
    rounded.copy_(reference.neg())
    torch.addmm(rounded, states, tile.T, out=rounded)
    out.copy_(rounded).add_(reference.to(out.dtype))


def _logits_by_tiles(states: Tensor, vocabulary: _Dense | _FourBit, dtype: torch.dtype) -> Tensor:
    """The product of all of `vocabulary` with states [n, D] in `dtype`, [n, V]; the factors are narrower."""
    size, width = vocabulary.shape[0], TILES["cpu"][1]
    logits = states.new_empty(states.shape[0], size, dtype=dtype)
    buffer, reference = states.new_empty(states.shape[0] * width), None
    for start in range(0, size, width):
        tile, out = vocabulary[start : start + width], logits[:, start : start + width]
        if reference is None:
            reference = torch.mm(states, tile.T).amax(dim=1).to(dtype)
        _product_beside(reference, states, tile, buffer[: out.numel()].view(out.shape), out)
        reference = torch.maximum(reference, out.amax(dim=1))
    return logits


class _Logits:
    """From a product h W^T to the logits z, and how steeply z follows it. bias: [V] or None."""

    def __init__(
        self, vocabulary: _Dense | _FourBit, bias: Tensor | None, logit_scale: float, soft_cap: float | None
    ) -> None:
        self.vocabulary, self.bias, self.logit_scale, self.soft_cap = vocabulary, bias, logit_scale, soft_cap

    def transform(
        self, product: Tensor, entries: slice | Tensor, inverse: Tensor, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """z, in the place of `product` [n, v], and d z / d product over logit_scale / T, or None where that is 1.

        entries: the v entries of the vocabulary, or [n] with v = 1 one a token; inverse: 1 / T [n]; slope: a buffer.
        """
        if self.bias is not None:
            offset = self.bias[entries]
            product.add_(offset if isinstance(entries, slice) else offset[:, None])
        if self.soft_cap is None:
            return product.mul_((self.logit_scale * inverse)[:, None]), None
        bent = product.mul_(self.logit_scale / self.soft_cap).tanh_()
        slope = torch.mul(bent, bent, out=slope).neg_().add_(1.0)
        return bent.mul_((self.soft_cap * inverse)[:, None]), slope


def tile_shape(device: str, tokens: int, width: int, vocabulary: int) -> tuple[int, int]:
    """Rows and columns of a tile for N tokens, D and V. A token needs two fp32 rows of the tile and up to four of D."""
    kind = device if device in TILES else "cuda"
    (rows, columns), buffers = TILES[kind], BUFFERS[kind]
    if kind == "cpu":
        while 2 * columns * width > PACKED and columns > 512:
            columns //= 2
        buffers -= 2 * columns * width
    fitting = int(buffers / (8 * columns + 16 * width)) // 128 * 128
    return min(rows, max(fitting, 128), max(1, tokens)), min(columns, vocabulary)


class _Tiles:
    """Tiles [n, v] of tokens times vocabulary, in buffers that are allocated once. inverse: 1 / T of each token [N]."""

    def __init__(self, hidden: Tensor, inverse: Tensor, logits: _Logits) -> None:
        dtype, device, vocabulary = inverse.dtype, hidden.device.type, logits.vocabulary
        self.rows, self.columns = tile_shape(device, *hidden.shape, vocabulary.shape[0])
        self.dtype, self._logits, self._vocabulary = dtype, logits, vocabulary
        self.product_dtype = _product_dtype(vocabulary.dtype, dtype, device)
        self._narrow = self.product_dtype != dtype
        self._rounds = _rounds(self.product_dtype, dtype, device)
        self._unit = logits.bias is None and logits.soft_cap is None and logits.logit_scale == 1.0
        self._unit = self._unit and bool((inverse == 1.0).all())
        self._kernel = _fold_kernel(device)
        size = self.rows * self.columns
        self._z = hidden.new_empty(size, dtype=dtype)
        self._exponentials = hidden.new_empty(size, dtype=self.product_dtype if self._kernel else dtype)
        self._slope = None if logits.soft_cap is None else hidden.new_empty(size, dtype=dtype)
        if self._rounds:
            self._rounded = hidden.new_empty(size, dtype=self.product_dtype)
            self._product = hidden.new_empty(self.rows * hidden.shape[1], dtype=self.product_dtype)

    def token_slices(self, count: int) -> list[slice]:
        return [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def vocabulary_slices(self) -> list[slice]:
        total = self._vocabulary.shape[0]
        return [slice(start, min(start + self.columns, total)) for start in range(0, total, self.columns)]

    def weight(self, columns: slice) -> Tensor:
        return self._vocabulary[columns].to(self.product_dtype)

    def first_reference(self, states: Tensor, product: Tensor) -> Tensor:
        """The largest of the target's product [n] and some others: what rounding is relative to in the first tile.

        Where the target is unlikely, its own product would be a poor one.
        """
        if not self._rounds:
            return product
        tile = self.weight(slice(0, min(512, self.columns)))
        first = self._rounded[: states.shape[0] * tile.shape[0]].view(states.shape[0], -1)
        return torch.maximum(product, torch.mm(states, tile.T, out=first).amax(dim=1).to(self.dtype))

    def next_reference(self, reference: Tensor, top: Tensor, inverse: Tensor) -> Tensor:
        if not self._rounds or self._logits.bias is not None or self._logits.soft_cap is not None:
            return reference
        return torch.maximum(reference, top / (self._logits.logit_scale * inverse))

    def logits(
        self, states: Tensor, tile: Tensor, columns: slice, reference: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """z [n, v] and its slope, as `_Logits.transform` has them. states: [n, D] and tile: [v, D] in `product_dtype`.

        A product that is stored in bf16 is rounded then. `reference` [n], near the largest product, is subtracted
        before that, so that the likely entries, which lie close to it, keep small absolute errors.
        """
        n, v = states.shape[0], tile.shape[0]
        out = self._z[: n * v].view(n, v)
        if self._rounds:
            _product_beside(reference, states, tile, self._rounded[: n * v].view(n, v), out)
        elif self._narrow:
            torch.mm(states, tile.T, out_dtype=self.dtype, out=out)
        else:
            torch.mm(states, tile.T, out=out)
        if self._unit:
            return out, None
        slope = None if self._slope is None else self._slope[: n * v].view(n, v)
        return self._logits.transform(out, columns, inverse, slope)

    def fold(self, softmax: _Softmax, logits: Tensor, target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`_Softmax.fold`, with the entry of each target then set to 0 in both tiles: exponentials, rise, factor."""
        exponentials = self._exponentials[: logits.numel()].view_as(logits)
        place, inside = target
        if self._kernel:
            return exponentials, *self._kernel(softmax, logits, exponentials, torch.where(inside, place, -1))
        rise, factor = softmax.fold(logits, exponentials)
        for tile in (logits, exponentials):
            _put(tile, place, inside, torch.zeros_like(factor))
        return exponentials, rise, factor

    def add_product(self, total: Tensor, left: Tensor, tile: Tensor) -> None:
        """total [n, D] += left [n, v] @ tile [v, D]; the sum over tiles stays in `dtype`."""
        n, v = left.shape
        if not self._narrow:
            total.addmm_(left, tile)
        elif self._rounds:
            product = self._product[: n * total.shape[1]].view(n, -1)
            torch.mm(self._rounded[: n * v].view(n, v).copy_(left), tile, out=product)
            total.add_(product)
        else:
            torch.addmm(total, left.to(tile.dtype), tile, out_dtype=self.dtype, out=total)


class _Head(torch.autograd.Function):
    """Accumulates, over the entries v other than the target y, with m the running maximum and s_v the slope of z_v,

        row = sum exp(z_v - m) s_v W[v]        entropy_row = sum exp(z_v - m) (z_v - m) s_v W[v]

    The target's share is put in at the end: near p(y) = 1 the sum with it would cancel.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, inverse: Tensor, form: _Logits, entropy_gradient: bool
    ):
        wants_hidden, ctx.wants_weight = ctx.needs_input_grad[:2]
        wants_entropy = wants_hidden and entropy_gradient
        dtype = inverse.dtype
        tiles = _Tiles(hidden, inverse, form)
        logp, entropy, normaliser = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
        jacobian = hidden.new_zeros(hidden.shape, dtype=dtype) if wants_hidden else None
        entropy_jacobian = torch.zeros_like(jacobian) if wants_entropy else None
        for rows in tiles.token_slices(hidden.shape[0]):
            states, inverse_rows = hidden[rows].to(tiles.product_dtype), inverse[rows]
            target_rows = form.vocabulary[targets[rows]].to(dtype)
            # The target's own logit is known without rounding.
            target_product = torch.linalg.vecdot(hidden[rows].to(dtype), target_rows)
            target_logit, target_slope = form.transform(target_product.clone()[:, None], targets[rows], inverse_rows)
            target_logit = target_logit.squeeze(1)
            reference = tiles.first_reference(states, target_product)
            softmax = _Softmax(target_logit)
            row = jacobian[rows] if wants_hidden else None
            entropy_row = entropy_jacobian[rows] if wants_entropy else None
            for columns in tiles.vocabulary_slices():
                tile = tiles.weight(columns)
                logits, slope = tiles.logits(states, tile, columns, reference, inverse_rows)
                target = _place(targets[rows], columns)
                _put(logits, *target, target_logit)
                exponentials, rise, factor = tiles.fold(softmax, logits, target)
                reference = tiles.next_reference(reference, softmax.top, inverse_rows)
                if wants_entropy:
                    entropy_row.addcmul_(row, rise[:, None], value=-1).mul_(factor[:, None])
                    tiles.add_product(entropy_row, logits if slope is None else logits.mul_(slope), tile)
                if wants_hidden:
                    row.mul_(factor[:, None])
                    tiles.add_product(row, exponentials if slope is None else exponentials.mul_(slope), tile)
            total, below = softmax.total, target_logit - softmax.top
            logp[rows] = below - softmax.others.log1p()
            entropy[rows] = softmax.entropy()
            normaliser[rows] = softmax.logsumexp()
            step = form.logit_scale * inverse_rows
            target_step = step if target_slope is None else step * target_slope.squeeze(1)
            share = below.exp()
            if wants_entropy:
                mean = softmax.weighted / total
                entropy_row.addcmul_(row, mean[:, None]).mul_((step / total).neg_()[:, None])
                entropy_row.addcmul_((target_step * share / total * (-below - mean))[:, None], target_rows)
            if wants_hidden:
                rest = torch.where(share == 1.0, softmax.others, total - share) / total
                row.mul_((step / total).neg_()[:, None]).addcmul_((target_step * rest)[:, None], target_rows)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.form, ctx.hidden_dtype, ctx.entropy_gradient = form, hidden.dtype, entropy_gradient
        saved = (hidden, weight, targets, inverse, normaliser, entropy) if ctx.wants_weight else ()
        ctx.save_for_backward(jacobian, entropy_jacobian, *saved)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp: Tensor, grad_entropy: Tensor):
        jacobian, entropy_jacobian, *saved = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if jacobian is not None:
            grad_hidden = torch.empty_like(jacobian, dtype=ctx.hidden_dtype)
            torch.mul(jacobian, grad_logp[:, None], out=grad_hidden)
        if entropy_jacobian is not None:
            grad_hidden += grad_entropy[:, None] * entropy_jacobian
        if ctx.wants_weight:
            grad_weight = _weight_gradient(ctx.form, grad_logp, grad_entropy if ctx.entropy_gradient else None, *saved)
        return grad_hidden, grad_weight, None, None, None, None


def _weight_gradient(
    form: _Logits,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse: Tensor,
    lse: Tensor,
    entropy: Tensor,
) -> Tensor:
    """[V, D]: the sum over tokens of (g (onehot(y) - p) - g_H p (log p + H)) dz/d(product) h, p from logsumexp [N]."""
    tiles = _Tiles(hidden, inverse, form)
    gradient = torch.zeros_like(weight)
    for columns in tiles.vocabulary_slices():
        tile = tiles.weight(columns)
        total = torch.zeros_like(tile, dtype=inverse.dtype)
        for rows in tiles.token_slices(hidden.shape[0]):
            states, inverse_rows = hidden[rows].to(tiles.product_dtype), inverse[rows]
            # Only rounding sees the reference: any value near the largest product will do.
            reference = lse[rows] / (form.logit_scale * inverse_rows)
            logits, slope = tiles.logits(states, tile, columns, reference, inverse_rows)
            logp = logits.sub_(lse[rows, None])
            force = logp.exp().mul_(-grad_logp[rows, None])
            if grad_entropy is not None:
                force.sub_(logp.exp().mul_(logp + entropy[rows, None]).mul_(grad_entropy[rows, None]))
            place, inside = _place(targets[rows], columns)
            force.scatter_add_(1, place[:, None], (inside * grad_logp[rows])[:, None])
            force.mul_((form.logit_scale * inverse_rows)[:, None])
            total.addmm_((force if slope is None else force.mul_(slope)).T, hidden[rows].to(inverse.dtype))
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
