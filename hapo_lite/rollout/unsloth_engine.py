"""Sampling with the `generate` of a model that Unsloth loaded (model/unsloth.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from hapo_lite.rollout.generate_engine import GenerateEngine


class UnslothEngine(GenerateEngine):
    """A `GenerateEngine` that calls Unsloth's `fast_generate`."""

    def generator(self, model: PreTrainedModel) -> Callable[..., Tensor]:
        # A model without `fast_generate` has a `generate` that is Unsloth's.
        return getattr(model, "fast_generate", None) or super().generator(model)
