"""Compares what verl's processes wrote down with the kit's own functions.

Axes: B completions of an iteration, T completion tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import TokenSignals, fit_signal, uncertain_tokens
from hapo_lite.model.policy import Policy
from hapo_lite.records import Sequences, pad
from hapo_lite.rollout.sampling import AdaptiveTemperature

METHOD = PRESETS["hapo"]
SAME, ROUNDED = 1e-5, 1e-3
"""The allowed difference between results of the same arithmetic in fp32, and between two forward passes in fp32."""


@dataclass(frozen=True)
class Check:
    """One comparison. count: numbers compared. found: the largest difference. allowed: the most that passes."""

    what: str
    count: int
    found: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.count > 0 and self.found <= self.allowed


@dataclass(frozen=True)
class Batch:
    """An iteration as verl's trainer had it before the update, in fp64.

    ids: [L_i] each, prompt and completion. prompt_lengths, lengths, rewards, groups: [B]. verl: what verl has of every
    token, [B, T] each, by its name there.
    """

    ids: list[Tensor]
    prompt_lengths: Tensor
    lengths: Tensor
    rewards: Tensor
    groups: Tensor
    verl: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Batch:
        record = torch.load(path, weights_only=True)
        numbers: dict[str, int] = {}
        return cls(
            [torch.cat(pair) for pair in zip(record["prompts"], record["responses"], strict=True)],
            torch.tensor([len(row) for row in record["prompts"]]),
            torch.tensor([len(row) for row in record["responses"]]),
            torch.stack([row.double().sum() for row in record["rm_scores"]]),
            torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in record["uid"]]),
            {
                name: pad([row.double() for row in record[name]])
                for name in ("rollout_log_probs", "old_log_probs", "entropy", "hapo_h", "advantages")
            },
        )

    @property
    def mask(self) -> Tensor:
        return torch.arange(int(self.lengths.max()))[None] < self.lengths[:, None]

    @property
    def signal(self) -> EntropySignal:
        return fit_signal(METHOD, self.verl["entropy"][self.mask].clamp_min(0.0))

    @property
    def h(self) -> Tensor:
        """[B, T], 0 where masked."""
        return self.signal.normalize(self.verl["entropy"].clamp_min(0.0)) * self.mask

    @property
    def advantage(self) -> Tensor:
        """[B]"""
        return group_advantage(self.rewards, self.lengths, self.groups, METHOD.advantage_level, METHOD.scale)

    def compared(self, what: str, name: str, own: Tensor, allowed: float, note: str = "") -> Check:
        """verl's numbers of that name against the kit's, [B, T], over the tokens that count."""
        difference = (self.verl[name] - own).abs()[self.mask]
        return Check(what, difference.numel(), float(difference.max()), allowed, note)


def checks(folder: Path, policies: list[Policy]) -> Iterator[Check]:
    """The comparisons of every recorded iteration, in order. policies: the weights that each of them sampled with."""
    steps = optimiser_steps(folder)
    previous = None
    for number, policy in enumerate(policies, 1):
        batch = Batch.read(folder / f"iteration-{number}.pt")
        own = forward(policy, batch, previous)
        of = f"iteration {number}: "
        yield batch.compared(f"{of}log-probability", "old_log_probs", own.logp, ROUNDED)
        yield batch.compared(f"{of}entropy", "entropy", own.entropy, ROUNDED)
        apart = float((own.sampled - own.logp).abs()[batch.mask].max())
        yield batch.compared(
            f"{of}sampled log-probability", "rollout_log_probs", own.sampled, ROUNDED, f"{apart:.3f} from T = 1"
        )
        yield batch.compared(f"{of}h", "hapo_h", batch.h, SAME)
        spread = batch.advantage[:, None].expand_as(batch.mask)
        differing = f"{int((batch.advantage != 0).sum())} of {len(batch.ids)} not 0"
        yield batch.compared(f"{of}advantage", "advantages", spread, SAME, differing)
        done = 0
        while done < len(batch.ids):
            step = next(steps)
            yield loss_check(f"{of}loss", batch, step)
            done += sum(len(part["rows"]) for part in step)
        previous = batch.signal


@dataclass(frozen=True)
class Forward:
    """The kit's pass over a batch, [B, T] each, fp64: log-probabilities, entropies, log-probabilities under Eq. 8."""

    logp: Tensor
    entropy: Tensor
    sampled: Tensor


def forward(policy: Policy, batch: Batch, signal: EntropySignal | None) -> Forward:
    """The kit's pass with these weights. signal: that of the iteration before; None: none, and temperature 1."""
    ids = torch.nn.utils.rnn.pad_sequence(batch.ids, batch_first=True)
    rows = Sequences(ids, batch.prompt_lengths, batch.lengths, batch.mask)
    with torch.no_grad():
        states = policy.head_states(rows)
        logp, entropy = policy.masked_logprobs(states, rows, 1.0)
        b, t = rows.mask.nonzero(as_tuple=True)
        at = batch.prompt_lengths[b] + t
        logits = states[b, at - 1] @ policy.base.get_output_embeddings().weight.T
        adapted = AdaptiveTemperature(signal, tau=METHOD.tau)(None, logits).log_softmax(-1)
    sampled = torch.zeros_like(logp).index_put((b, t), adapted.gather(1, ids[b, at][:, None]).squeeze(1))
    return Forward(logp.double(), entropy.double(), sampled.double())


def optimiser_steps(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each optimiser step, over all processes. A step's tokens are the sum of its micro-batches'.

    The processes cut a step into equally many micro-batches.
    """
    step: list[dict[str, Any]] = []
    for path in sorted(folder.glob("loss-*.pt")):
        step.append(torch.load(path, weights_only=True))
        if sum(len(row) for part in step for row in part["log_probs"]) == step[0]["tokens"]:
            yield step
            step = []


def loss_check(what: str, batch: Batch, step: list[dict[str, Any]]) -> Check:
    """The loss of an optimiser step: verl's sum over micro-batches and processes, the kit's in one piece."""
    rows = [row for part in step for row in part["rows"]]
    width = batch.mask.shape[1]
    logp = pad([row.double() for part in step for row in part["log_probs"]])
    logp = torch.nn.functional.pad(logp, (0, width - logp.shape[1]))
    h, mask, entropy = batch.h[rows], batch.mask[rows], batch.verl["entropy"][rows]
    tokens = TokenSignals(h, entropy, uncertain_tokens(METHOD, batch.signal, entropy), torch.ones(len(rows)).double())
    weights = loss_weights(mask, METHOD.loss_average).double()
    inputs = LossInputs(batch.verl["old_log_probs"][rows], batch.advantage[rows], tokens, weights)
    own, _ = method_loss(METHOD, logp, inputs, loss_denominator(batch.lengths[rows], METHOD.loss_average))
    theirs = sum(part["loss"] / part["processes"] for part in step)
    stopped = int((own.clipped_low | own.clipped_high).sum())
    note = f"{theirs:+.6f}; {len(step)} micro-batches; {stopped} of {int(mask.sum())} tokens clipped"
    return Check(what, 1, abs(theirs - float(own.loss)), SAME, note)
