"""Merge an adapter into its base, write the merged model, and compare it as it is read back."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from hapo_lite.errors import UserError
from hapo_lite.export.bases import ORIGINAL, TRAINED, Choice, Trained
from hapo_lite.export.parity import Drift, effect_of_adapter, measure_drift, refer
from hapo_lite.export.probes import Probes, compute_in_fp32, gather_probes
from hapo_lite.export.source import TOKENIZER_FILES, Source, base_config, base_files, own_dtype
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MEMORY_FACTOR = 1.3
"""Memory that merging takes, as a multiple of the weights. The rest is the widest layer in fp32, and activations."""


@dataclass(frozen=True)
class MergeSettings:
    """How a merge is made. dtype: that of the written weights (auto, bf16, fp16 or fp32); auto: that of the base.

    onto: "trained" or "original", the base of a run on a 4-bit base; None: the base on which the adapter is nearer to
    what was trained.
    """

    dtype: str = "auto"
    onto: str | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge was compared with. drift: from the adapter on the base that it was merged into. choice: of that
    base; None for a run whose base was not in 4 bits."""

    drift: Drift
    choice: Choice | None


def merge(source: Source, folder: Path, settings: MergeSettings, say: Callable[[str], None]) -> Merged:
    """Write the merged model into `folder`, and compare it, read back, with the adapter on its base.

    say: prints a line. All sides are computed in fp32, so a difference comes from the weights. Raises UserError if the
    merged model differs by more than rounding explains, or if there is no such base.
    """
    dtype, onto = settings.dtype, settings.onto
    four_bit = source.model.quantization == "nf4"
    if onto == TRAINED and not four_bit:
        raise UserError(
            "--onto trained is for a run on a 4-bit base, and this one was trained on the original base "
            "(model.quantization = none): leave --onto out"
        )
    config = base_config(source)
    base_dtype = own_dtype(config)
    written = base_dtype if dtype == "auto" else DTYPES[dtype]
    loaded = torch.promote_types(base_dtype, written)
    parameters = count_parameters(config)
    need_disk(folder, parameters * written.itemsize)
    device = placement(parameters * loaded.itemsize)
    say(f"merging {source.adapter} into {source.model.name} on {device}, to {NAMES[written]}")
    trained = _trained(source, device, say) if four_bit else None
    policy = _load(source, source.base, device, loaded, source.adapter)
    _check_origin(source, policy)
    probes = gather_probes(source, policy, say)
    choice = None
    if trained is not None:
        choice = _choose(trained, policy, probes, onto)
        say(choice.sentence())
        if choice.onto == ORIGINAL:
            del policy
            _free()
            policy = _load(source, source.base, device, loaded, source.adapter)
    reference = refer(policy, probes, trained.reference.texts if trained else ())
    effect = effect_of_adapter(policy, reference)
    _write(source, policy, folder, written)
    del policy
    _free()
    merged = _load(source, str(folder), device, written, None)
    with merged.base_alone():
        drift = measure_drift(merged, probes, reference, effect, written)
    del merged
    _free()
    if problem := drift.problem():
        raise UserError(f"the merged model is {problem}")
    say(drift.sentence())
    return Merged(drift, choice)


def _trained(source: Source, device: torch.device, say: Callable[[str], None]) -> Trained:
    """The results of the adapter on its 4-bit base."""
    policy = _load(source, source.base, device, torch.float32, source.adapter, "nf4")
    _check_origin(source, policy)
    found = Trained.of(policy, gather_probes(source, policy, say))
    del policy
    _free()
    return found


def _choose(trained: Trained, policy: Policy, probes: Probes, onto: str | None) -> Choice:
    """The base to merge into. policy: the adapter on the original base; its base is the unpacked one afterwards."""
    original = trained.gap(policy, probes)
    trained.unpack_into(policy)
    gaps = {TRAINED: trained.gap(policy, probes), ORIGINAL: original}
    nearer = min(gaps, key=lambda name: gaps[name].mean)
    return Choice(onto or nearer, onto is not None, gaps)


def _check_origin(source: Source, policy: Policy) -> None:
    """Raise UserError if the base is not the one that the run recorded. A run without a record passes."""
    trained_on = source.origins.get("model", policy.origin)
    if policy.origin != trained_on:
        raise UserError(
            f"model.name = {source.model.name} is not the model that the run was trained on ({trained_on}; now "
            f"{policy.origin}): put that model back, or use --to adapter"
        )


def count_parameters(config: Any) -> int:
    """The number of parameters of a model with this configuration. No weight is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def need_disk(folder: Path, size: int) -> None:
    """Raise UserError if the disk of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.2g} GB left and the merged model takes {size / 1e9:.2g} GB: free some "
            "space, or give --output on another disk"
        )


def placement(size: int) -> torch.device:
    """The device to merge and compare on: the GPU if `size` bytes of weights fit, else the CPU.

    Raises UserError if neither has enough memory.
    """
    free = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    free |= {"cpu": psutil.virtual_memory().available}
    for device, left in free.items():
        if MEMORY_FACTOR * size <= left:
            return torch.device(device)
    raise UserError(
        f"merging takes {MEMORY_FACTOR * size / 1e9:.2g} GB of memory and {free['cpu'] / 1e9:.2g} GB are free: close "
        "other programs, or use --to adapter"
    )


def _load(
    source: Source,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Path | None,
    quantization: str = "none",
) -> Policy:
    """The model `name` with weights of `dtype`, or in 4 bits, computing in fp32. adapter: None for the model alone."""
    changes = {
        "name": name,
        "adapter": None,
        "revision": source.revision if name == source.base else None,
        "quantization": quantization,
        "dtype": NAMES[dtype],
        "gradient_checkpointing": False,
        # Flash attention does not compute in fp32.
        "attention": "eager" if source.model.attention == "eager" else "sdpa",
    }
    policy = load_policy(source.model.model_copy(update=changes), source.recipe.seed, device, adapter)
    return compute_in_fp32(policy)


def _write(source: Source, policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, the configuration, the generation settings with all stop tokens, and the tokenizer."""
    try:
        model = policy.model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"{source.adapter} cannot be merged: {error}") from error
    model.to(dtype).save_pretrained(folder)
    for name, path in base_files(source, (*TOKENIZER_FILES, "config.json")).items():
        shutil.copyfile(path, folder / name)
    rewrite(folder / "config.json", lambda config: readable_config(config, dtype))
    if (folder / "tokenizer_config.json").is_file():
        rewrite(folder / "tokenizer_config.json", readable_tokenizer)


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the content of a JSON file by `change` of it."""
    fields = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def readable_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's configuration with keys for transformers 4 as well as 5, since llama.cpp's converter uses 4.57.

    Version 4 does not know rope_parameters, and would give the model the default rope_theta.
    """
    name = str(dtype).removeprefix("torch.")
    rope = config.get("rope_parameters")
    older: dict[str, Any] = {}
    if isinstance(rope, dict) and "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**older, **config, "dtype": name, "torch_dtype": name}


def readable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json for both versions. Version 4 has other names for two of version 5's values."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
