"""Sampling with the `generate` of a model that Unsloth loaded (model/unsloth.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from hapo_lite.rollout.generate_engine import GenerateEngine


class UnslothEngine(GenerateEngine):
    """Samples with Unsloth's `fast_generate`; the rest is plain `generate`'s engine."""

    def generator(self, model: PreTrainedModel) -> Callable[..., Tensor]:
        return getattr(model, "fast_generate", model.generate)  # which is its own too, where there is no other
