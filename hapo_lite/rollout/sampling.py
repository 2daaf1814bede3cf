"""What every engine shares: the adaptive temperature as a logits processor, and random numbers fixed in advance.

Axes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.head import logits_statistics


class AdaptiveTemperature(LogitsProcessor):
    """Divides each row's logits by its own temperature (Eq. 8).

    It looks at one row at a time and at nothing but that row's logits, so it works in any batch. After a call,
    `entropy` and `temperature` [B] hold what it saw and did: entropy is that of logits / base, in nats.

    top_k, top_p: at that temperature, tokens outside the k likeliest, then outside the nucleus, the fewest likeliest of
    those that hold so much probability, get logits of -inf (Holtzman et al. 2020, arXiv 1904.09751); None and 1.0 leave
    all. In training the recipe asks for truncated importance weights with them, which is what `sampling_logp`, of the
    distribution that is left, is kept for.
    """

    def __init__(
        self,
        signal: EntropySignal | None,
        base: float = 1.0,
        tau: float = 0.05,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> None:
        self.signal, self.base, self.tau = signal, base, tau
        self.truncations: list[LogitsProcessor] = [] if top_k is None else [TopKLogitsWarper(top_k)]
        self.truncations += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
        self.entropy = self.temperature = self.log_normalizer = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scaled = scores.float() if self.base == 1.0 else scores.float() / self.base
        self.log_normalizer, self.entropy = logits_statistics(scaled)
        self.temperature = adaptive_temperature(self.entropy, self.signal, self.base, self.tau)
        scores = scaled * (self.base / self.temperature)[:, None]
        for truncate in self.truncations:
            scores = truncate(input_ids, scores)
        return scores


def uniforms(seed: int, stage: int, iteration: int, prompt: int, sample: int, count: int) -> Tensor:
    """The random numbers of one completion, one a position: [count], fp64, in [0, 1).

    A function of its arguments alone, so that a completion does not depend on the batch it is sampled in.
    """
    return torch.from_numpy(np.random.default_rng((seed, stage, iteration, prompt, sample)).random(count))


def inverse_cdf(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution. scores: [B, V] logits; uniform: [B] -> ids [B].

    The sum runs in fp64: in fp32 a vocabulary of 150,000 loses the tail to rounding. The token found always has a
    probability above 0, since the cumulative distribution rises at it.
    """
    cumulative = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum_(dim=-1)
    threshold = uniform.to(cumulative) * cumulative[:, -1]
    found = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1)
    return found.clamp_max_(scores.shape[-1] - 1)


class Stage(enum.IntEnum):
    """What a completion is sampled for; separates the random numbers."""

    TRAINING = 0
    EVALUATION = 1
    BENCHMARK = 2
    CANARY = 3


@dataclass(frozen=True)
class DrawKey:
    """What the random numbers of a call depend on, besides prompt and sample."""

    seed: int
    stage: Stage
    iteration: int
