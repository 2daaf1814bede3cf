"""From a product h W^T to the logits z: bias, scale, soft cap and temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.head.vocabulary import Vocabulary

MASKED = -1e30
"""What a bias of -inf counts as: its entry's probability is 0, and no inf - inf or 0 * inf arises."""


@dataclass(frozen=True)
class LogitForm:
    """z = cap(logit_scale (h W^T + bias)) / T with cap(x) = soft_cap tanh(x / soft_cap), or x where soft_cap is None.

    vocabulary: W; bias: [V], finite, in the dtype of the logits, or None.
    """

    vocabulary: Vocabulary
    bias: Tensor | None
    logit_scale: float
    soft_cap: float | None

    @classmethod
    def of(
        cls,
        vocabulary: Vocabulary,
        bias: Tensor | None,
        logit_scale: float,
        soft_cap: float | None,
        dtype: torch.dtype,
    ) -> LogitForm:
        """Check a caller's options and convert the bias to `dtype`.

        Raises ValueError on a scale or cap not above 0, a bias of another shape, and one of -inf under a soft cap.
        """
        size = vocabulary.shape[0]
        for name, value in (("logit_scale", logit_scale), ("soft_cap", soft_cap)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if bias is not None:
            if bias.shape != (size,):
                raise ValueError(f"bias {tuple(bias.shape)} must be [{size}], one an entry of the vocabulary")
            if soft_cap is not None and bool(torch.isneginf(bias).any()):
                raise ValueError("a bias of -inf masks nothing under soft_cap, which bounds the logits")
            bias = bias.detach().to(dtype).clamp_min(MASKED)
        return cls(vocabulary, bias, logit_scale, soft_cap)

    @property
    def plain(self) -> bool:
        """Whether z is the product over T, without bias, scale and cap."""
        return self.bias is None and self.soft_cap is None and self.logit_scale == 1.0

    def transform(
        self, product: Tensor, entries: slice | Tensor, inverse: Tensor, slope: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """z, in the place of `product` [n, v], and d z / d product over logit_scale / T, or None where that is 1.

        entries: the v entries of the vocabulary, or [n], one a token, with v = 1; inverse: 1 / T [n]; slope: a buffer
        [n, v].
        """
        if self.bias is not None:
            offset = self.bias[entries]
            product.add_(offset if isinstance(entries, slice) else offset[:, None])
        if self.soft_cap is None:
            return product.mul_((self.logit_scale * inverse)[:, None]), None
        bent = product.mul_(self.logit_scale / self.soft_cap).tanh_()
        slope = torch.mul(bent, bent, out=slope).neg_().add_(1.0)
        return bent.mul_((self.soft_cap * inverse)[:, None]), slope
