"""What is said of weights that are not in 4 bits: stacked experts, and layers of a class of their own."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hapo_lite.model.policy import Policy


def notes_on_experts(model: nn.Module) -> list[str]:
    """A sentence about stacked experts: their size, their dtype, and which have adapters; nothing for other models.

    bitsandbytes packs linear layers alone. peft adapts some models' stacked experts and not others'.
    """
    stacked = {
        name.replace(".base_layer", ""): weight
        for name, weight in model.named_parameters()
        if weight.ndim >= 3 and "experts" in name and "lora_" not in name
    }
    if not stacked:
        return []
    adapted = {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and hasattr(module, "parameter_name")
    }
    with_adapter, without = _kinds(stacked.keys() & adapted), _kinds(stacked.keys() - adapted)
    adapters = f"with adapters on {', '.join(with_adapter)}" if with_adapter else "without adapters"
    if with_adapter and without:
        adapters += f" and none on {', '.join(without)}"
    dtypes = " and ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in stacked.values()}))
    count = sum(weight.numel() for weight in stacked.values())
    return [
        f"note: the experts, {count / 1e6:,.2f} M of the weights, are stacked tensors, no linear layers: they are in "
        f"{dtypes}, not in 4 bits, {adapters}"
    ]


def notes_on_packing(policy: Policy) -> list[str]:
    """A sentence if no layer of a 4-bit base is packed: bitsandbytes packs no class of its own, such as Falcon's."""
    if policy.dense is None or policy.dense.size:
        return []
    return [
        "note: model.quantization = nf4 packs no layer of this base, whose linear layers are of a class of its own, so "
        "its weights take what they take without it"
    ]


def _kinds(names: set[str]) -> list[str]:
    """The last parts of the names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})
