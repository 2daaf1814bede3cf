"""Autograd's backward pass in Python, node by node, for tensors of the pretended GPU.

torch's own engine gives each device a thread, and asks the driver how many devices there are. The graph and the
formulas of its nodes are torch's; only their order is chosen here.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from tests.pretend_gpu.device import Refused

Gradients = list[Tensor | None]


@torch.no_grad()
def backward(root: Tensor, gradient: Tensor | None = None) -> None:
    """Add the gradient of `root` to the `.grad` of the leaves that it depends on. gradient: 1 if None."""
    if root.grad_fn is None:
        raise RuntimeError("this tensor does not depend on any parameter")
    pending = _dependencies(root.grad_fn)
    received: dict[Any, Gradients] = {root.grad_fn: [torch.ones_like(root) if gradient is None else gradient]}
    order = itertools.count()
    # The engine takes the node that was made last, of those whose gradients are complete.
    ready = [(-root.grad_fn._sequence_nr(), next(order), root.grad_fn)]
    while ready:
        node = heapq.heappop(ready)[2]
        for (following, place), found in _call(node, received.pop(node)):
            incoming = received.setdefault(following, [None] * len(following._input_metadata))
            if found is not None:
                found = _fitting(found, following._input_metadata[place])
                before = incoming[place]
                incoming[place] = found if before is None else before + found
            pending[following] -= 1
            if pending[following] == 0:
                heapq.heappush(ready, (-following._sequence_nr(), next(order), following))


def _dependencies(root: Any) -> Counter[Any]:
    """How many edges lead to each node."""
    counted: Counter[Any] = Counter()
    todo, known = [root], {root}
    while todo:
        for following, _ in todo.pop().next_functions:
            if following is not None:
                counted[following] += 1
                if following not in known:
                    known.add(following)
                    todo.append(following)
    return counted


def _call(node: Any, gradients: Gradients) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """The node's outgoing edges with the gradient of each."""
    if hasattr(node, "variable"):
        leaf, [gradient] = node.variable, gradients
        if gradient is not None:
            leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad + gradient
        return []
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if isinstance(node, BackwardCFunction):
        # The engine fills in zeros, and passes on the gradients of those arguments that want one.
        full = [_zeros(m) if g is None else g for g, m in zip(gradients, node._input_metadata, strict=True)]
        found = node.apply(*full)
        found = found if isinstance(found, tuple) else (found,)
        wanted = [g for g, wants in itertools.zip_longest(found, node.needs_input_grad) if wants]
        return list(zip(edges, wanted, strict=True))
    found = node(*gradients)
    found = found if isinstance(found, tuple) else (found,)
    pairs = zip(node.next_functions, found, strict=True)
    return [(edge, gradient) for edge, gradient in pairs if edge[0] is not None]


def _zeros(metadata: Any) -> Tensor:
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)


def _fitting(gradient: Tensor, metadata: Any) -> Tensor:
    """The gradient in the shape and the dtype of the tensor that it belongs to. Refuses one of another device."""
    if gradient.device != metadata.device:
        raise Refused(f"a gradient on {gradient.device} belongs to a tensor on {metadata.device}")
    if gradient.shape != torch.Size(metadata.shape):
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)
