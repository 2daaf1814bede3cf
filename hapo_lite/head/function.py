"""`token_logprobs`: the pass over tokens and vocabulary, as a function that autograd knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hapo_lite.head.gradient import Distributions, Jacobian, Target, weight_gradient
from hapo_lite.head.logits import LogitForm
from hapo_lite.head.product import result_dtype
from hapo_lite.head.softmax import Softmax
from hapo_lite.head.tiles import Places, Tiles, Tokens
from hapo_lite.head.vocabulary import open_vocabulary


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
    vocabulary = open_vocabulary(weight)
    dtype = result_dtype(hidden.dtype)
    _check(hidden, vocabulary.shape, targets)
    scaling = _Scaling.of(temperature, hidden, dtype)
    form = LogitForm.of(vocabulary, bias, logit_scale, soft_cap, dtype)
    if not torch.is_grad_enabled():
        # A custom function is told that its input wants a gradient even where none is recorded.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        logp, entropy = _Head.apply(hidden, weight, targets, scaling, form, entropy_gradient)  # type: ignore[no-untyped-call]
    return logp, entropy


@dataclass(frozen=True)
class _Scaling:
    """inverse: 1 / T of each token [N]; unscaled: whether every T is 1."""

    inverse: Tensor
    unscaled: bool

    @classmethod
    def of(cls, temperature: float | Tensor, hidden: Tensor, dtype: torch.dtype) -> _Scaling:
        """The scaling of the tokens `hidden`, [N, D]. A number is checked on the host, which need not wait for it.

        Raises ValueError on a temperature of another shape or not above 0.
        """
        count = hidden.shape[:1]
        if not isinstance(temperature, Tensor):
            number = float(torch.tensor(temperature, dtype=dtype))
            temperature = torch.full((), number, dtype=dtype, device=hidden.device)
            least = most = number
        else:
            if temperature.shape not in (count, ()):
                raise ValueError(
                    f"temperature {tuple(temperature.shape)} must be a number or [{count[0]}], one a token"
                )
            temperature = temperature.to(hidden.device, dtype)
            least, most = torch.stack(temperature.aminmax()).tolist() if temperature.numel() else (1.0, 1.0)
        if not least > 0:
            raise ValueError(f"temperature must be positive, not {least}")
        return cls(temperature.reciprocal().expand(count), unscaled=least == most == 1.0)


def _check(hidden: Tensor, weight: torch.Size, targets: Tensor) -> None:
    """Raise ValueError where the arguments of `token_logprobs` do not fit together. weight: its shape."""
    if hidden.dim() != 2 or len(weight) != 2 or hidden.shape[1] != weight[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight)} must be [N, D] and [V, D]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}], one a token")
    if targets.numel():
        lowest, highest = torch.stack(targets.aminmax()).tolist()  # together, which is one wait on a GPU
        if lowest < 0 or highest >= weight[0]:
            raise ValueError(f"targets lie in [{lowest}, {highest}], outside the vocabulary of {weight[0]}")


class _Head(torch.autograd.Function):
    """Forward makes the Jacobian in the hidden states, so backward reads no logits unless the weight is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scaling: _Scaling,
        form: LogitForm,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, ctx.wants_weight = ctx.needs_input_grad[:2]
        inverse = scaling.inverse
        tokens = Tokens(hidden, targets, inverse, scaling.unscaled)
        tiles = Tiles(tokens, form)
        logp, entropy, normaliser = (hidden.new_empty(hidden.shape[0], dtype=inverse.dtype) for _ in range(3))
        jacobian = Jacobian.zeros(hidden, inverse.dtype, entropy_gradient) if wants_hidden else None
        for rows in tiles.token_slices(hidden.shape[0]):
            part_jacobian = None if jacobian is None else jacobian.rows(rows)
            softmax, target_logit = _read_vocabulary(tiles, tokens.rows(rows), part_jacobian)
            logp[rows] = target_logit - softmax.top - softmax.log_total
            entropy[rows] = softmax.entropy()
            normaliser[rows] = softmax.logsumexp()
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        ctx.form, ctx.hidden_dtype, ctx.entropy_gradient = form, hidden.dtype, entropy_gradient
        ctx.unscaled = scaling.unscaled
        rows_of_jacobian = (None, None) if jacobian is None else (jacobian.logp, jacobian.entropy)
        for_weight = (hidden, weight, targets, inverse, normaliser, entropy) if ctx.wants_weight else ()
        ctx.save_for_backward(*rows_of_jacobian, *for_weight)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, entropy_jacobian, *for_weight = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if jacobian is not None:
            grad_hidden = torch.empty_like(jacobian, dtype=ctx.hidden_dtype)
            torch.mul(jacobian, grad_logp[:, None], out=grad_hidden)
        if entropy_jacobian is not None:
            grad_hidden += grad_entropy[:, None] * entropy_jacobian
        if ctx.wants_weight:
            hidden, weight, targets, inverse, normaliser, entropy = for_weight
            tokens = Tokens(hidden, targets, inverse, ctx.unscaled)
            distributions = Distributions(normaliser, entropy)
            on_entropy = grad_entropy if ctx.entropy_gradient else None
            grad_weight = weight_gradient(weight, ctx.form, tokens, distributions, grad_logp, on_entropy)
        return grad_hidden, grad_weight, None, None, None, None


def _read_vocabulary(tiles: Tiles, tokens: Tokens, jacobian: Jacobian | None) -> tuple[Softmax, Tensor]:
    """One pass over the vocabulary for n tokens: their softmax and the logit of each target [n]; fills `jacobian`."""
    target = Target.of(tokens, tiles.form)
    states = tokens.hidden.to(tiles.product.factors)
    reference = tiles.first_reference(states, target.product)
    softmax = Softmax.empty(target.logit)
    for columns in tiles.vocabulary_slices():
        tile = tiles.weight(columns)
        logits, slope = tiles.logits(states, tile, columns, reference, tokens.inverse)
        places = Places.of(tokens.targets, columns)
        # The product may have rounded the target's logit.
        places.put(logits, target.logit)
        folded = tiles.fold(softmax, logits, places)
        softmax = folded.softmax
        reference = tiles.next_reference(reference, softmax.top, tokens.inverse)
        if jacobian is not None:
            jacobian.add(tiles, tile, slope, folded)
    if jacobian is not None:
        jacobian.finish(softmax, target, tiles.form.logit_scale * tokens.inverse)
    return softmax, target.logit
