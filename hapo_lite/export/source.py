"""What is exported: a run's recipe and adapter, and the model it was trained on, as its own files describe that."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from hapo_lite.errors import UserError
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.recipe import ModelSettings, Recipe, load_recipe
from hapo_lite.runs.checkpoint import STATE, file_hash, read_record
from hapo_lite.runs.folder import RunFolder

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
"""What a base's tokenizer may consist of."""


@dataclass(frozen=True)
class Source:
    """folder: the run's; sha256: of the adapter's weights; summary: of the run, or {} where that is of another adapter.

    origins: which model and data the run was trained on, as it recorded them; base: what `from_pretrained` takes.
    """

    folder: RunFolder
    recipe: Recipe
    adapter: Path
    sha256: str
    summary: dict[str, Any]
    origins: dict[str, str]

    @property
    def model(self) -> ModelSettings:
        return self.recipe.model

    @property
    def base(self) -> str:
        if self.model.name == "tiny":
            return str(TINY_MODEL)
        # A folder is named from anywhere, not from where the run was started alone.
        return str(Path(self.model.name).resolve()) if Path(self.model.name).is_dir() else self.model.name

    @property
    def revision(self) -> str | None:
        """Of a hub name: the commit that the run loaded, else the recipe's, which may be a branch."""
        kind, _, commit = self.origins.get("model", "").partition(" ")
        return commit if kind == "commit" else self.model.revision


def open_source(run: Path, adapter: Path | None) -> Source:
    """adapter: another folder than the run's own. Raises UserError where there is nothing to export."""
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
    sha256, summary = file_hash(chosen / WEIGHTS), {}
    if folder.summary.is_file():
        try:
            summary = json.loads(folder.summary.read_text(encoding="utf-8"))
            trained = summary["adapter_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder.summary} cannot be read: {type(error).__name__}: {error}") from None
        if trained != sha256:
            if adapter is None:
                raise UserError(
                    f"{chosen / WEIGHTS} is not what the run ended with: run its training command again, which writes "
                    "it anew, or name a folder with --adapter"
                )
            summary = {}
    origins = summary.get("origins") or _of_checkpoint(chosen)
    return Source(folder, recipe, chosen, sha256, summary, origins)


def _of_checkpoint(folder: Path) -> dict[str, str]:
    """The origins that a checkpoint recorded; {} where `folder` is none."""
    return read_record(folder).get("origins", {}) if (folder / STATE).is_file() else {}


def base_config(source: Source) -> Any:
    """The base's configuration. Raises UserError if it is not there, or of a model that is not merged into."""
    if source.model.trust_remote_code:
        raise UserError(
            f"model.name = {source.model.name} brings code of its own, which a merged folder would have to carry: use "
            "--to adapter"
        )
    try:
        config = AutoConfig.from_pretrained(source.base, trust_remote_code=False, revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name = {source.model.name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"model.name = {source.model.name} is quantised itself, and an adapter is merged into full weights only: "
            "use --to adapter"
        )
    return config


def own_dtype(config: Any) -> torch.dtype:
    """Of the base's weights; fp32 where it does not say or has another than these."""
    dtype = getattr(config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def base_files(source: Source, names: tuple[str, ...]) -> dict[str, Path]:
    """Those of the base's files that it has, as they are on this machine."""
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
