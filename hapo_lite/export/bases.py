"""The base that an adapter is merged into: the original one, or the 4-bit one that it was trained on, unpacked.

An adapter that was trained on a 4-bit base corrects that base's errors too, and is another model on the original one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hapo_lite.export.parity import Reference, refer
from hapo_lite.export.probes import Probes, answers, logprobs
from hapo_lite.model.policy import Policy

TRAINED, ORIGINAL = "trained", "original"
BASES = {TRAINED: "the 4-bit base of the training, unpacked", ORIGINAL: "the original base"}
"""The values of --onto, and what each stands for."""


@dataclass(frozen=True)
class Gap:
    """The difference between the adapter on an unpacked base and the adapter on the 4-bit base, as it was trained.

    tokens: number of tokens compared. mean, largest: |difference| of log-probabilities, nats a token. same: number of
    greedy answers, of `prompts`, that are equal.
    """

    tokens: int
    mean: float
    largest: float
    same: int
    prompts: int

    def __str__(self) -> str:
        return (
            f"{self.mean:.2g} nats a token (at most {self.largest:.2g}; {self.same} of {self.prompts} greedy answers "
            "the same)"
        )


@dataclass(frozen=True)
class Choice:
    """The base of a merge. onto: a key of BASES. asked: whether --onto named it. gaps: by base."""

    onto: str
    asked: bool
    gaps: Mapping[str, Gap]

    def sentence(self) -> str:
        """The choice with both distances, in one sentence."""
        why = "as --onto asks" if self.asked else "the nearer one"
        return (
            f"merged into {BASES[self.onto]}, {why}: the adapter on {BASES[TRAINED]} is {self.gaps[TRAINED]} from what "
            f"was trained, and on {BASES[ORIGINAL]} {self.gaps[ORIGINAL]}"
        )

    def as_json(self) -> dict[str, Any]:
        """The fields of export.json that tell the choice. four_bit: the distance on the original base."""
        onto = {"base": self.onto, "asked": self.asked, "unpacked": asdict(self.gaps[TRAINED])}
        return {"onto": onto, "four_bit": asdict(self.gaps[ORIGINAL])}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Choice | None:
        """The choice that `as_json` wrote into a record; None if it has none."""
        onto = record.get("onto")
        if onto is None:
            return None
        return cls(onto["base"], onto["asked"], {TRAINED: Gap(**onto["unpacked"]), ORIGINAL: Gap(**record["four_bit"])})


@dataclass(frozen=True)
class Trained:
    """The model as it was trained. reference: its results. packed: the names of its layers that are in 4 bits."""

    reference: Reference
    packed: tuple[str, ...]

    @classmethod
    def of(cls, policy: Policy, probes: Probes) -> Trained:
        """The results of the adapter on its 4-bit base."""
        packed = tuple(name for name, layer in policy.model.named_modules() if isinstance(layer, Linear4bit))
        return cls(refer(policy, probes), packed)

    def gap(self, policy: Policy, probes: Probes) -> Gap:
        """The distance between another model and this one."""
        gap = (logprobs(policy, self.reference.texts) - self.reference.logp).abs()
        written = answers(policy, probes.prompts)
        same = sum(a == b for a, b in zip(written, self.reference.answers, strict=True))
        return Gap(gap.numel(), float(gap.mean()), float(gap.max()), same, len(probes.prompts))

    def unpack_into(self, policy: Policy) -> None:
        """Give the layers of the same model in full weights what the 4-bit layers unpack to, in the weights' dtype."""
        layers = dict(policy.model.named_modules())
        for name in self.packed:
            layer = cast(nn.Linear, layers[name])
            layer.weight.data = through_four_bits(layer.weight.data, isinstance(layer, Conv1D))


@torch.no_grad()
def through_four_bits(weight: Tensor, transposed: bool = False) -> Tensor:
    """A weight, [out, in], as bitsandbytes packs it in NF4 with double quantisation and unpacks it; in its own dtype.

    transposed: the weight is [in, out], as in a Conv1D, which is packed the other way round.
    """
    rows = weight.T if transposed else weight
    # bitsandbytes declares `to` with a type that its own class does not fit.
    packed: Any = Params4bit(rows.float().contiguous(), requires_grad=False, quant_type="nf4")
    packed = packed.to(weight.device)
    unpacked = dequantize_4bit(packed, packed.quant_state).to(weight.dtype)
    return unpacked.T.contiguous() if transposed else unpacked
