"""The LoRA adapter: created, read from a folder, and written so that plain peft reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.lora import start_magnitudes, use_two_products
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.model.policy import Policy
from hapo_lite.model.targets import check_head_is_free, check_targets, peft_targets, untouched_layers
from hapo_lite.recipe import ModelSettings

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter, as peft names them."""


@contextlib.contextmanager
def peft_packages() -> Iterator[None]:
    """A context that turns an ImportError of peft into a UserError.

    For a plain layer peft looks for packages with layers of their own, and raises if one is too old. torchao is such a
    package, and Colab has one of 0.10 installed (peft 0.21 asks for 0.16).
    """
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"peft cannot make the adapter beside a package that is installed here ({first_line(error)}): upgrade that "
            "package or uninstall it, such as with pip uninstall torchao"
        ) from error


def fresh_adapter(base: PreTrainedModel, settings: ModelSettings, seed: int) -> PeftModel:
    """Put a new adapter on the base, with weights that depend on the seed alone.

    Raises UserError if model.lora does not fit the model.
    """
    torch.manual_seed(seed)
    model = adapted(base, settings)
    start_magnitudes(model)
    return model


def adapted(base: PreTrainedModel, settings: ModelSettings) -> PeftModel:
    """The base with the layers of an adapter. Raises UserError if model.lora does not fit the model."""
    lora, targets = settings.lora, peft_targets(settings.lora)
    check_targets(base, lora, settings.name)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank: a fraction will do
        lora_dropout=0.0,  # with dropout the ratio would differ from 1 before the first update
        target_modules=targets,
        exclude_modules=untouched_layers(base, lora),
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        task_type="CAUSAL_LM",
    )
    try:
        with peft_packages():
            model = get_peft_model(base, config)
    except ValueError as error:
        if "use_dora" in str(error):
            raise UserError(
                f"model.lora.variant = dora does not fit {settings.name}: its experts are stacked tensors, and peft "
                "has no DoRA for those; use model.lora.variant=lora or rslora, or name the layers in model.lora.targets"
            ) from error
        raise UserError(f"model.lora.targets = {targets!r} does not fit {settings.name}: {error}") from error
    check_head_is_free(base, lora, settings.name)
    use_two_products(model)
    return model


def check_adapter(folder: Path) -> None:
    """Raise UserError if a folder is not a saved adapter."""
    # Without these files peft would read a pickle, or ask the hub for a repository of the folder's name.
    for needed in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / needed).is_file():
            raise UserError(f"adapter {folder} has no {needed}: give a folder like runs/NAME/adapter")


def saved_adapter(base: PreTrainedModel, settings: ModelSettings, folder: Path) -> PeftModel:
    """Put a saved adapter on the base, to sample from and not to train. Raises UserError if it does not fit."""
    check_adapter(folder)
    try:
        with peft_packages():
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise  # the adapter may well fit the model
        raise UserError(f"adapter {folder} does not fit {settings.name}: {first_line(error)}") from error
    use_two_products(model)
    return model


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter so that plain peft reads it."""
    # Without this, peft asks the hub whether the base's embedding was resized.
    policy.model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def load_adapter(policy: Policy, folder: Path) -> None:
    """Read adapter weights that `save_adapter` wrote into the policy. Raises UserError if they do not fit."""
    if not read_weights(policy.model, load_file(folder / ADAPTER_WEIGHTS)):
        raise UserError(f"the adapter in {folder} does not fit this model and these model.lora settings")


def read_weights(model: PeftModel, weights: Mapping[str, Tensor]) -> bool:
    """Copy the weights of an adapter, by peft's names, into the model's. Returns whether they are the same ones."""
    # peft's annotation of the result names no fields.
    outcome: Any = set_peft_model_state_dict(model, dict(weights))
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    return not missing and not outcome.unexpected_keys
