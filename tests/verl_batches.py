"""A batch as verl hands it to the plug-in, and what the kit's own loop makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.tokens import TokenSignals, fit_signal, uncertain_tokens

LENGTHS = [5, 1, 7, 3, 6, 6, 2, 7, 4, 5, 3, 1]
GROUPS = [0, 1, 0, 2, 1, 2, 0, 1, 2, 2, 1, 0]
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0]  # group 2 has equal ones
OFF = {
    "B": {"token_level_advantage": False},
    "C": {"redistribution": False},
    "D": {"adaptive_clip": False},
    "B, C": {"token_level_advantage": False, "redistribution": False},
    "C, D": {"redistribution": False, "adaptive_clip": False},
}
METHODS = {
    **{name: PRESETS[name] for name in ("hapo", "hapo_public_code", "dapo", "grpo")},
    **{f"hapo without {pieces}": replace(PRESETS["hapo"], **off) for pieces, off in OFF.items()},
    **{f"dapo, scale {scale}": replace(PRESETS["dapo"], scale=scale) for scale in ("batch", "none")},
}


def mode_of(method):
    return {"token": "token-mean", "sequence": "seq-mean-token-mean"}[method.loss_average]


def in_the_loop(method, batch, rows):
    """The same by the functions that the loop calls, on the whole optimiser step."""
    logp = batch.logp.clone().requires_grad_()
    rewards, lengths, groups = torch.tensor(REWARDS).double(), torch.tensor(LENGTHS), torch.tensor(GROUPS)
    advantage = group_advantage(rewards, lengths, groups, method.advantage_level, method.scale)
    mask = batch.mask[rows].bool()
    loss, _ = method_loss(
        method,
        logp[rows],
        LossInputs(
            batch.old_logp[rows],
            advantage[rows],
            TokenSignals(batch.h[rows], batch.entropy[rows], batch.uncertain[rows], torch.ones(len(rows)).double()),
            loss_weights(mask, method.loss_average),
        ),
        loss_denominator(mask.sum(dim=1), method.loss_average),
    )
    loss.loss.backward()
    return float(loss.loss.detach()), logp.grad


def random_batch(method):
    """Random completions, fp64. Log-probabilities are NaN in the padding, where they must not be looked at."""
    torch.manual_seed(5)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]

    def padded(values):
        return torch.where(mask, values, math.nan).double()

    old_logp = padded(-3 * torch.rand(mask.shape))
    entropy = (torch.rand(mask.shape) ** 6 * 3).double() * mask
    last = torch.zeros(mask.shape).double()
    last[range(len(LENGTHS)), [n - 1 for n in LENGTHS]] = torch.tensor(REWARDS).double()
    signal = fit_signal(method, entropy[mask])
    return SimpleNamespace(
        h=signal.normalize(entropy),
        uncertain=uncertain_tokens(method, signal, entropy),
        mask=mask.long(),
        old_logp=old_logp,
        logp=old_logp + padded(0.4 * torch.randn(mask.shape)),
        entropy=entropy,
        rewards=last,
        uids=np.array([f"uid-{g}" for g in GROUPS], dtype=object),
    )
