"""The source of an export: a run's recipe, its adapter, and the base model that its files name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from hapo_lite.errors import UserError, first_line
from hapo_lite.recipe import ModelSettings, Recipe, load_recipe
from hapo_lite.runs.checkpoint import STATE, file_hash, read_record
from hapo_lite.runs.folder import RunFolder
from hapo_lite.tiny.bundled import MODELS

WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""The files that a base's tokenizer may consist of."""


@dataclass(frozen=True)
class Source:
    """A run and the adapter of it that is exported.

    adapter: the adapter's folder. sha256: the digest of its weights. summary: the run's summary.json, or {} if that
    describes another adapter. origins: the model and the data that the run was trained on, as the run recorded them.
    """

    folder: RunFolder
    recipe: Recipe
    adapter: Path
    sha256: str
    summary: dict[str, Any]
    origins: dict[str, str]

    @property
    def model(self) -> ModelSettings:
        """The recipe's section on the model."""
        return self.recipe.model

    @property
    def method(self) -> str:
        """The method that the adapter was trained with; `sft` for a warm start."""
        return str(self.summary.get("method", self.recipe.method.preset))

    @property
    def base(self) -> str:
        """The base's name for `from_pretrained`: a hub name, or the absolute path of a folder."""
        if bundled := MODELS.get(self.model.name):
            return str(bundled)
        return str(Path(self.model.name).resolve()) if Path(self.model.name).is_dir() else self.model.name

    @property
    def revision(self) -> str | None:
        """The commit of the base that the run loaded, else the revision in the recipe, which may be a branch."""
        kind, _, commit = self.origins.get("model", "").partition(" ")
        return commit if kind == "commit" else self.model.revision


def open_source(run: Path, adapter: Path | None) -> Source:
    """The run with the adapter to export. adapter: the folder of a checkpoint; None: the run's last adapter.

    Raises UserError if there is nothing to export.
    """
    folder = RunFolder(run)
    if not folder.recipe.is_file():
        raise UserError(f"{run} is no run: it has no recipe.yaml; give a folder like runs/NAME")
    recipe = load_recipe(folder.recipe)
    chosen = adapter or folder.adapter
    for needed in (ADAPTER_CONFIG, WEIGHTS):
        if not (chosen / needed).is_file():
            raise UserError(
                f"{chosen} has no {needed}: let the run finish, or give --adapter {folder.checkpoints}/NNNNNN"
            )
    sha256 = file_hash(chosen / WEIGHTS)
    summary = _read_summary(folder)
    if summary and summary["adapter_sha256"] != sha256:
        if adapter is None:
            raise UserError(
                f"{chosen / WEIGHTS} is not what the run ended with: run its training command again, which writes "
                "the adapter anew, or name a folder with --adapter"
            )
        summary = {}
    origins = summary.get("origins") or _origins_of_checkpoint(chosen)
    return Source(folder, recipe, chosen, sha256, summary, origins)


def _read_summary(folder: RunFolder) -> dict[str, Any]:
    """The run's summary.json, which names its adapter; {} if there is none. Raises UserError if it is broken."""
    if not folder.summary.is_file():
        return {}
    try:
        summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
        summary["adapter_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.summary} cannot be read: {type(error).__name__}: {error}") from None
    return summary


def _origins_of_checkpoint(folder: Path) -> dict[str, str]:
    """The origins that a checkpoint recorded; {} if `folder` is not a checkpoint."""
    return read_record(folder).get("origins", {}) if (folder / STATE).is_file() else {}


def base_config(source: Source) -> Any:
    """The base's configuration. Raises UserError if it cannot be loaded, or if an adapter cannot be merged into it."""
    if source.model.trust_remote_code:
        raise UserError(
            f"model.name = {source.model.name} brings code of its own, which the merged folder would need too: use "
            "--to adapter"
        )
    try:
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=False, revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name = {source.model.name} cannot be loaded: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.name = {source.model.name} is quantised itself, and an adapter is merged into full weights only: "
            "use --to adapter"
        )
    return config


def own_dtype(config: Any) -> torch.dtype:
    """The dtype of the base's weights: bf16 or fp16 if its configuration says so, else fp32."""
    dtype = getattr(config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def base_files(source: Source, names: tuple[str, ...]) -> dict[str, Path]:
    """The paths on this machine of those of the base's files that exist, by name."""
    found = {
        name: cached_file(
            source.base,
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in names
    }
    return {name: Path(path) for name, path in found.items() if path}
