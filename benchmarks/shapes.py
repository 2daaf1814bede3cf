"""The sizes of the models that benchmarks make with random weights, all of Qwen2's architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Qwen2Config


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: layers, hidden width, query heads, key heads, MLP width, vocabulary.

    tied: whether its head is its embedding.
    """

    layers: int
    hidden: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    tied: bool = True

    def config(self, **options: Any) -> Qwen2Config:
        """The configuration of such a model. options: further fields."""
        return Qwen2Config(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            **options,
        )


QWEN_1_5B = Shape(layers=28, hidden=1536, heads=12, key_heads=2, inner=8960, vocabulary=151_936)
QWEN_7B = Shape(layers=28, hidden=3584, heads=28, key_heads=4, inner=18_944, vocabulary=152_064, tied=False)
"""Qwen2.5 and Qwen2.5-Math of 1.5B and 7B."""
LLAMA_8B = Shape(layers=32, hidden=4096, heads=32, key_heads=8, inner=14_336, vocabulary=128_256, tied=False)
"""Llama 3.1 of 8B."""
