"""The language-model head without N x V logits: hidden states to log-probability and entropy, with an exact gradient.

Axes in this room: N tokens, D hidden, V vocabulary. A tile holds n of the tokens and v of the vocabulary's entries.
Names in formulas: h is a hidden state, W the weight [V, D], y a token's target, T its temperature, z its logits at that
temperature, p their softmax, H the entropy of p.

Each tile of tokens reads the vocabulary once, tile by tile, as attention with query h and keys = values = W: an online
softmax keeps, for each token, the largest logit, two sums for the entropy, and, when a gradient is wanted, the running
row of

    d logp / d hidden = (W[y] - softmax(z) W) / T

in fp32. The loss reaches the hidden states only through logp, so backward is one scaling of those rows: 4NDV flops for
both directions, no logits kept, and none computed twice unless the head itself is trained. An entropy that takes part
in the loss costs one product more, for a row of its own: d H / d hidden = -sum_v p_v (log p_v + H) W[v] / T.

Each file imports only files above it:

    shape        how large a tile is
    vocabulary   rows of W, dense or packed in 4 bits
    product      h W^T, and how it is rounded
    logits       z from the product
    softmax      the online softmax
    triton       its step as one GPU kernel
    tiles        the buffers of a tile, and the steps on one
    gradient     the Jacobian in the hidden states, the gradient in W
    function     token_logprobs
"""

from hapo_lite.head.function import token_logprobs
from hapo_lite.head.product import next_token_logits
from hapo_lite.head.shape import tile_shape
from hapo_lite.head.softmax import logits_statistics

__all__ = ["logits_statistics", "next_token_logits", "tile_shape", "token_logprobs"]
