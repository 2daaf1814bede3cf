"""The adaptive temperature and the draw of a token: the same functions for every engine.

Axes: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.head import logits_statistics
from hapo_lite.rollout.inversion import draw_token


@dataclass(frozen=True)
class SamplingSettings:
    """What the distribution that a token is drawn from depends on, apart from the logits.

    signal, base, tau: arguments of `adaptive_temperature`. truncations: applied in order to the scaled logits; each
    sets the logits of the tokens that it excludes to -inf.
    """

    signal: EntropySignal | None
    base: float
    tau: float
    truncations: tuple[Callable[[Any, Tensor], Tensor], ...]


@dataclass(frozen=True)
class Adapted:
    """Logits at their adaptive temperature, fp32.

    scores: [B, V], unnormalised, -inf for tokens that a truncation excludes. entropy, log_normalizer: [B], entropy in
    nats and logsumexp of logits / base, before any truncation. temperature: [B].
    """

    scores: Tensor
    entropy: Tensor
    temperature: Tensor
    log_normalizer: Tensor


@dataclass(frozen=True)
class Drawn:
    """One token for each row and its record, [B] each, with the meanings of `Completion`.

    scores: [B, V], what the tokens were drawn from.
    """

    ids: Tensor
    sampling_logp: Tensor
    base_logp: Tensor
    entropy: Tensor
    temperature: Tensor
    scores: Tensor


def adapted_scores(logits: Tensor, settings: SamplingSettings) -> Adapted:
    """Divide each row of logits, [B, V], by its own temperature (Eq. 8), then truncate.

    A row depends on nothing but its own logits, so it comes out the same in any batch.
    """
    scaled = logits.float() if settings.base == 1.0 else logits.float() / settings.base
    log_normalizer, entropy = logits_statistics(scaled)
    temperature = adaptive_temperature(entropy, settings.signal, settings.base, settings.tau)
    # Without a signal the factor is 1.
    scores = scaled if settings.signal is None else scaled * (settings.base / temperature)[:, None]
    for truncate in settings.truncations:
        scores = truncate(None, scores)  # a truncation reads no token ids
    return Adapted(scores, entropy, temperature, log_normalizer)


class AdaptiveTemperature(LogitsProcessor):
    """The adaptive temperature as a logits processor of transformers. It keeps nothing between calls.

    signal, base, tau: as in `adaptive_temperature`. top_k, top_p, min_p: at that temperature, only the k likeliest
    tokens are kept, then the nucleus, which is the smallest set of likeliest tokens that holds probability top_p
    (Holtzman et al. 2020, arXiv 1904.09751), then the tokens at least min_p times as likely as the likeliest one
    (Nguyen et al. 2024, arXiv 2407.01082). None, 1.0 and 0.0 keep all tokens. In training a recipe with any of them
    also needs truncated importance weights, which are computed from `Completion.sampling_logp`.

    Engines call `adapted`, so a subclass that changes the temperature overrides that method.
    """

    def __init__(
        self,
        signal: EntropySignal | None,
        base: float = 1.0,
        tau: float = 0.05,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
    ) -> None:
        truncations: list[Callable[[Any, Any], Any]] = []
        if top_k is not None:
            truncations.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            truncations.append(TopPLogitsWarper(top_p))
        if min_p > 0.0:
            truncations.append(MinPLogitsWarper(min_p))
        self.settings = SamplingSettings(signal, base, tau, tuple(truncations))

    def adapted(self, logits: Tensor) -> Adapted:
        """`adapted_scores` with this processor's settings. logits: [B, V]."""
        return adapted_scores(logits, self.settings)

    # transformers asks for FloatTensor, a type that no tensor has.
    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """The adapted scores of the logits `scores`, [B, V]. input_ids: not read."""
        return self.adapted(scores).scores


def draw(processor: AdaptiveTemperature, logits: Tensor, uniform: Tensor) -> Drawn:
    """Draw one token for each row. logits: [B, V] as the model gives them; uniform: [B], in [0, 1)."""
    adapted = processor.adapted(logits)
    ids, sampling_logp = draw_token(adapted.scores, uniform)
    # Converted after it is gathered: the whole vocabulary in fp32 would be one more copy.
    chosen = logits.gather(1, ids[:, None]).squeeze(1).float()
    return Drawn(
        ids,
        sampling_logp,
        base_logp=chosen / processor.settings.base - adapted.log_normalizer,
        entropy=adapted.entropy,
        temperature=adapted.temperature,
        scores=adapted.scores,
    )
