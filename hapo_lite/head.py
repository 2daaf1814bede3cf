"""The language-model head without N x V logits: hidden states to log-probability and entropy, with an exact gradient.

Axes: N tokens, D hidden, V vocabulary. Tokens are taken in chunks; of a chunk's logits only one log-probability, one
entropy and, when a gradient is wanted, one row of the Jacobian

    d logp / d hidden = (W[y] - softmax(z) W) / T

survive. The loss reaches the hidden states only through logp, so backward is one scaling of those rows: no logits are
kept, and none are computed twice unless the head itself is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once, at most: 64 MiB in fp32."""


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each next-token distribution at `temperature`.

    hidden: [N, D]; weight: [V, D]; targets: [N] integer ids. Returns logp [N], differentiable in `hidden` (and in
    `weight` where it requires a gradient), and entropy [N], detached; nats; fp32, or fp64 for fp64 input.
    Raises ValueError on shapes that do not fit, an id outside [0, V) or a temperature that is not positive.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}], one a token")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets lie in [{int(targets.min())}, {int(targets.max())}], outside the vocabulary of {weight.shape[0]}"
        )
    return _Head.apply(hidden, weight, targets, temperature)


def logits_statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp, entropy) over the last axis: [..., V] -> [...], [...]; nats.

    With m the largest logit and s the sum of exp(z - m) over all other entries,
    H = log1p(s) + sum(exp(z - m) (m - z)) / (1 + s). Every term is non-negative, so nothing cancels: the relative error
    stays near 1e-7 in fp32 where logsumexp(z) - sum(p z) has lost every digit.
    """
    top, others, _, entropy = _fold(logits)
    return top + others.log1p(), entropy


def _fold(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest logit m [...], sum of the other exponentials s [...], exp(z - m) [..., V], entropy [...]."""
    top, where = logits.max(dim=-1, keepdim=True)
    # A masked logit is -inf; a finite distance keeps 0 * inf out of the entropy.
    distance = (top - logits).clamp_max_(torch.finfo(logits.dtype).max)
    exponentials = distance.neg().exp_()
    exponentials.scatter_(-1, where, 0.0)
    others = exponentials.sum(dim=-1)
    weighted = distance.mul_(exponentials).sum(dim=-1)
    exponentials.scatter_(-1, where, 1.0)
    return top.squeeze(-1), others, exponentials, others.log1p() + weighted / (1.0 + others)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp = hidden.new_empty(hidden.shape[0], dtype=dtype)
        entropy = torch.empty_like(logp)
        jacobian = hidden.new_empty(hidden.shape, dtype=dtype) if wants_hidden else None
        for rows in _chunks(hidden, weight):
            logp[rows], entropy[rows], slope = _chunk(
                hidden[rows], weight, targets[rows], temperature, dtype, slope=wants_hidden
            )
            if wants_hidden:
                jacobian[rows] = _matmul(slope, weight)
        ctx.temperature, ctx.wants_weight = temperature, wants_weight
        ctx.hidden_dtype, ctx.dtype = hidden.dtype, dtype
        ctx.save_for_backward(jacobian, *((hidden, weight, targets) if wants_weight else ()))
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp: Tensor, _: Tensor):
        jacobian, *rest = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if jacobian is not None:
            grad_hidden = (grad_logp[:, None] * jacobian).to(ctx.hidden_dtype)
        if ctx.wants_weight:
            hidden, weight, targets = rest
            total = torch.zeros_like(weight, dtype=ctx.dtype)
            for rows in _chunks(hidden, weight):
                *_, slope = _chunk(hidden[rows], weight, targets[rows], ctx.temperature, ctx.dtype, slope=True)
                total += _matmul((slope * grad_logp[rows, None]).T, hidden[rows])
            grad_weight = total.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the dtype of `right`, returned in the dtype of `left`."""
    with torch.autocast(right.device.type, enabled=False):
        return (left.to(right.dtype) @ right).to(left.dtype)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype, slope: bool):
    """logp [n], entropy [n] and, if wanted, d logp / d logits [n, V] of a chunk, including the factor 1 / T."""
    logits = _matmul(hidden.to(dtype), weight.T)
    if temperature != 1.0:
        logits = logits / temperature
    top, others, exponentials, entropy = _fold(logits)
    index = targets[:, None]
    target_logit = logits.gather(1, index).squeeze(1)
    logp = (target_logit - top) - others.log1p()
    if not slope:
        return logp, entropy, None
    total = 1.0 + others
    target_share = exponentials.gather(1, index).squeeze(1)
    # 1 - p(y), which is s / (1 + s) for the most likely token: taken from s, or it would round to 0 when p(y) is near
    # 1.
    rest = torch.where(target_share == 1.0, others, total - target_share) / total
    coefficients = exponentials.div_(total[:, None]).neg_().scatter_(1, index, rest[:, None])
    return logp, entropy, coefficients.div_(temperature)
