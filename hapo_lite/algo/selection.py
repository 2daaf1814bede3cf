"""Which tokens a method singles out before an iteration's first update, by a draw or by what they carry.

Axes: N tokens, flattened, normally all of an iteration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method


def covariant_tokens(method: Method, logp: Tensor, advantage: Tensor, uniform: Tensor) -> Tensor:
    """The tokens that Clip-Cov detaches (arXiv 2505.22617): bool [N]. logp, advantage, uniform: [N].

    The covariance of a token is (log p - mean) (A - mean). Of the tokens whose covariance lies between the method's two
    bounds, covariance_share * N are drawn, at least one: those with the lowest `uniform`, a random number of each.
    """
    logp, advantage = logp.double(), advantage.double()
    covariance = (logp - logp.mean()) * (advantage - advantage.mean())
    inside = (covariance > method.covariance_low) & (covariance < method.covariance_high)
    return _first(inside, uniform, max(1, int(method.covariance_share * len(logp))))


def surprising_tokens(method: Method, logp: Tensor, advantage: Tensor) -> Tensor:
    """The tokens that STARE amplifies (arXiv 2606.19236): bool [N]. logp, advantage: [N].

    Of the tokens with A > 0 these are the share surprisal_share with the lowest log-probability, at least one of them.
    """
    rising = advantage > 0
    # Without the small number 0.07 * 100, which is 7.000000000000001, would become 8.
    count = math.ceil(method.surprisal_share * int(rising.sum()) - 1e-9)
    return _first(rising, logp, max(1, count))


def _first(among: Tensor, key: Tensor, count: int) -> Tensor:
    """The `count` tokens with the lowest `key` among those that are true, bool [N]; all of them if they are fewer."""
    places = among.nonzero().flatten()
    order = key[places].argsort(stable=True)
    chosen = torch.zeros_like(among)
    chosen[places[order[:count]]] = True
    return chosen


def advantage_factor(method: Method, logp: Tensor, advantage: Tensor, entropy: Tensor, uniform: Tensor) -> Tensor:
    """The factors on the advantage with which Clip-Cov and STARE single out tokens, [N].

    logp, entropy (nats): of the old policy, [N]. advantage: [N]. uniform: [N], a random number in [0, 1) a token.
    """
    factor = torch.ones_like(logp)
    if method.surprisal_factor != 1.0 and float(entropy.double().mean()) < method.surprisal_below:
        factor = factor.masked_fill(surprising_tokens(method, logp, advantage), method.surprisal_factor)
    if method.covariance_share > 0.0:
        factor = factor.masked_fill(covariant_tokens(method, logp, advantage, uniform), 0.0)
    return factor
