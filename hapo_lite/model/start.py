"""The adapter that training goes on from, `model.adapter`: where it lies, and whether it fits the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, read_weights
from hapo_lite.model.origins import Origin, folder_digest, object_in
from hapo_lite.model.targets import peft_targets
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.tiny.bundled import same_bundled

UNLIKE = {
    "rank_pattern": "a rank for each layer",
    "alpha_pattern": "an alpha for each layer",
    "modules_to_save": "whole layers",
    "trainable_token_indices": "embeddings of single tokens",
    "target_parameters": "parameters that are no layers",
    "layer_replication": "repeated layers",
    "lora_bias": "biases",
}
"""Options of peft by which an adapter is more than the layers' factors that are trained here, and what each stands
for."""
VARIANTS = {"use_rslora": "rslora", "use_dora": "dora"}
"""Options of peft, and the values of model.lora.variant that they stand for."""


@dataclass(frozen=True)
class StartingAdapter:
    """The adapter that `model.adapter` names. folder: holds its two files. sha256: of its weights."""

    name: str
    folder: Path
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}, sha256 {self.sha256}"


def starting_adapter(settings: ModelSettings, origin: Origin) -> StartingAdapter | None:
    """The adapter that `model.adapter` names; None if the recipe names none.

    origin: of the base. Raises UserError if there is no such adapter, or if its configuration does not fit the recipe.
    """
    if settings.adapter is None:
        return None
    folder = adapter_folder(settings.adapter)
    check_adapter(folder)
    try:
        config = object_in(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter = {settings.adapter} cannot be read: {first_line(error)}") from None
    _check_kind(config, settings.adapter)
    _check_variant(config, settings)
    _check_base(config, settings, origin)
    _check_sizes(config, settings)
    with (folder / ADAPTER_WEIGHTS).open("rb") as file:
        return StartingAdapter(settings.adapter, folder, hashlib.file_digest(file, "sha256").hexdigest())


def adapter_folder(name: str) -> Path:
    """The folder with the files of the adapter `name`: a run's folder, an adapter's, a checkpoint's, or a hub name.

    Raises UserError if there is no such adapter.
    """
    folder = Path(name)
    if folder.is_dir():
        for place in (folder, folder / "adapter"):
            if (place / ADAPTER_CONFIG).is_file():
                return place
        checkpoints = sorted(folder.glob("checkpoints/[0-9]*"))
        if checkpoints:
            raise UserError(
                f"model.adapter = {name} is a run without an adapter so far: let it finish, or start from its newest "
                f"checkpoint with model.adapter={checkpoints[-1]}"
            )
        raise UserError(
            f"model.adapter = {name} holds no adapter: give a run's folder, its adapter/, one of its checkpoints, or "
            f"another folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model.adapter = {name} is not a folder: give a run's folder such as runs/NAME, or a hub name")
    try:
        cached_file(name, ADAPTER_WEIGHTS)
        config = cached_file(name, ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.adapter = {name} is neither a folder here nor an adapter that the hub gives: check the name and "
            f"the network ({first_line(error)})"
        ) from None
    return Path(str(config)).parent  # cached_file says None, for a case that raises here


def read_start(model: PeftModel, start: StartingAdapter, settings: ModelSettings) -> None:
    """Read the weights of `start` into the adapter of `model`. Raises UserError if they belong to other layers."""
    try:
        weights = load_file(start.folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.adapter = {start.name} cannot be read: {first_line(error)}") from None
    _check_layers(weights, get_peft_model_state_dict(model), start.name, settings)
    read_weights(model, weights)


def _check_kind(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError for an adapter that computes something else than LoRA's product of two matrices."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"model.adapter = {name} is of peft's kind {kind}, and LORA is trained here: give another one")
    found = [f"{meaning} ({option})" for option, meaning in UNLIKE.items() if config.get(option)]
    if config.get("bias", "none") != "none":
        found.append(f"biases (bias = {config['bias']})")
    if found:
        raise UserError(
            f"model.adapter = {name} has {found[0]}, and plain LoRA is trained here: give an adapter without, or merge "
            "this one into its base and give the result as model.name"
        )


def _check_variant(config: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raise UserError for an adapter that computes with the same matrices in another way than the recipe's."""
    found = [variant for option, variant in VARIANTS.items() if config.get(option)] or ["lora"]
    if len(found) > 1:
        raise UserError(
            f"model.adapter = {settings.adapter} has rsLoRA and DoRA at once, and one of them is trained here: give "
            "another adapter, or merge this one into its base and give the result as model.name"
        )
    if found[0] != settings.lora.variant:
        raise UserError(
            f"model.adapter = {settings.adapter} is of the variant {found[0]}, and model.lora.variant = "
            f"{settings.lora.variant}: set model.lora.variant={found[0]}"
        )


def _check_base(config: Mapping[str, Any], settings: ModelSettings, origin: Origin) -> None:
    """Raise UserError for an adapter of another base. One that names no base passes; its layers are compared later."""
    base = config.get("base_model_name_or_path")
    if not base or _is_base(str(base), origin):
        return
    raise UserError(
        f"model.adapter = {settings.adapter} belongs to the base {base}, and model.name = {settings.name}: set "
        f"model.name={base}, or, if both are the same model, write the recipe's name into the adapter's "
        f"{ADAPTER_CONFIG} as base_model_name_or_path"
    )


def _is_base(base: str, origin: Origin) -> bool:
    """Whether the base that an adapter names is the model of `origin`: by its name, or by a folder's contents."""
    if base == origin.name:
        return True
    if same_bundled(base, origin.name):
        return True
    theirs = Path(base)
    return theirs.is_dir() and origin.digest is not None and folder_digest(theirs) == origin.digest


def _check_sizes(config: Mapping[str, Any], settings: ModelSettings) -> None:
    """Raise UserError for an adapter of another rank or alpha."""
    for setting, theirs, ours in (
        ("rank", config.get("r", 8), settings.lora.rank),
        ("alpha", config.get("lora_alpha", 8), settings.lora.alpha),
    ):
        if not isinstance(theirs, (int, float)):
            raise UserError(
                f"model.adapter = {settings.adapter} cannot be read: its {ADAPTER_CONFIG} has the {setting} {theirs!r}"
            )
        if theirs != ours:
            raise UserError(
                f"model.adapter = {settings.adapter} has {setting} {theirs:g}, and model.lora.{setting} = {ours:g}: "
                f"set model.lora.{setting}={theirs:g}"
            )


def _check_layers(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], name: str, settings: ModelSettings) -> None:
    """Raise UserError if two adapters' weights differ in their layers or sizes. theirs, ours: by peft's names."""
    start = f"model.adapter = {name}"
    if theirs.keys() != ours.keys():
        layers, wanted = _layers(theirs), _layers(ours)
        if layers != wanted:
            raise UserError(
                f"{start} adapts {', '.join(layers) or 'no layer'}, and model.lora.targets = "
                f"{_shown(settings.lora)} adapts {', '.join(wanted)}: set model.lora.targets=[{','.join(layers)}]"
            )
        raise UserError(
            f"{start} has {len(theirs)} matrices, and model.lora puts {len(ours)} on {settings.name}: give an adapter "
            "of the same layers of the same model"
        )
    for key, weight in theirs.items():
        if weight.shape != ours[key].shape:
            raise UserError(
                f"{start} has matrices of {tuple(weight.shape)} where {settings.name} needs {tuple(ours[key].shape)} "
                f"({key}): give an adapter of this model, or set model.name to the adapter's"
            )


def _layers(keys: Iterable[str]) -> list[str]:
    """The names of the layers that the matrices of an adapter belong to, such as q_proj."""
    return sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in keys})


def _shown(lora: LoraSettings) -> str:
    targets = peft_targets(lora)
    return targets if isinstance(targets, str) else f"[{', '.join(targets)}]"
