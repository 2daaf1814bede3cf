"""The layers that model.lora.targets names, checked against a model before peft looks for them."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from hapo_lite.errors import UserError
from hapo_lite.recipe import LoraSettings, nearest

READ_BY_KERNELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Types of models whose `out_proj` peft 0.21 refuses to adapt."""


def peft_targets(lora: LoraSettings) -> str | list[str]:
    """The setting as peft takes it: one pattern, or a list of names."""
    return lora.targets if isinstance(lora.targets, str) else list(lora.targets)


def untouched_layers(base: PreTrainedModel, lora: LoraSettings) -> list[str] | None:
    """Layers that `all-linear` names and peft cannot adapt, for peft's `exclude_modules`; None if there are none.

    Such are linear layers that do more than a product, like a router that returns two tensors, and those that peft
    refuses since the kernels of state-space models read their weights without calling them.
    """
    if lora.targets != "all-linear":
        return None
    beside_kernels = base.config.model_type in READ_BY_KERNELS
    found = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and ((beside_kernels and name.endswith("out_proj")) or not _is_a_product(module))
    ]
    return found or None


@torch.no_grad()
def _is_a_product(layer: nn.Linear) -> bool:
    """Whether a linear layer, or one of a class of its own, gives one tensor of the width that its weight says."""
    if isinstance(layer, Linear4bit) or type(layer).forward is nn.Linear.forward:
        return True
    try:
        out = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # the class's own code may raise anything
        return False
    return isinstance(out, Tensor) and out.shape == (1, layer.out_features)


def check_targets(base: PreTrainedModel, lora: LoraSettings, model: str) -> None:
    """Raise UserError if a name in model.lora.targets is no layer of the base, or is its head or its embeddings.

    model: model.name. A pattern is left to peft, since all of it matches something or nothing does.
    """
    if isinstance(lora.targets, str):
        return
    start = f"model.lora.targets = {peft_targets(lora)!r} does not fit {model}"
    modules = dict(base.named_modules())
    outside = {id(base.get_output_embeddings()): "the head is", id(base.get_input_embeddings()): "the embedding is"}
    for target in lora.targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            layers = sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)})
            raise UserError(
                f"{start}: it has no layer {target!r}{nearest(target, layers)}; its linear layers are "
                f"{', '.join(layers)}"
            )
        for name in found:
            if part := outside.get(id(modules[name])):
                raise UserError(
                    f"{start}: {part} among them, and training reads its frozen weight: take {target!r} out of the list"
                )


def check_head_is_free(base: PreTrainedModel, lora: LoraSettings, model: str) -> None:
    """Raise UserError if an adapter is on the head or the embeddings, where a pattern can put it."""
    for part in (base.get_output_embeddings(), base.get_input_embeddings()):
        if isinstance(part, BaseTunerLayer):
            raise UserError(
                f"model.lora.targets = {peft_targets(lora)!r} does not fit {model}: the head or the embedding is among "
                "them, and training reads its frozen weight: give a list of other layers"
            )
