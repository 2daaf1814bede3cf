"""Where a model or data set comes from: its commit or its files, and whether code that comes with it may run.

The contents behind a hub name can change, so the name is resolved to a commit once and everything is loaded from that.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from hapo_lite.errors import UserError
from hapo_lite.recipe import ModelSettings
from hapo_lite.tiny.bundled import MODELS

TINY_MODEL = MODELS["tiny"]
HASHED_WHOLE = 64 << 20
"""Largest file, bytes, that is hashed whole. Of a larger file the size and SAMPLES pieces of PIECE bytes are hashed."""
LOADED = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja", ".py")
SAMPLES, PIECE = 64, 1 << 16
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
"""Arguments with which `cached_file` returns None for a file that it does not get."""


@dataclass(frozen=True)
class Origin:
    """The exact contents that a name stands for.

    name: hub name or folder, as transformers takes it. commit: for a hub name. digest: for a folder, of its files.
    """

    name: str
    commit: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        return f"commit {self.commit}" if self.commit else f"files {self.digest}"


def model_origin(settings: ModelSettings) -> Origin:
    """The contents that `model.name` and `model.revision` stand for at this moment.

    Raises UserError if they are not a model, and the error of transformers if nothing is found or the hub is not
    reached.
    """
    if bundled := MODELS.get(settings.name):
        return Origin(str(bundled), digest=folder_digest(bundled))
    folder = Path(settings.name)
    if folder.is_dir():
        _refuse_adapter(settings.name, folder / "adapter_config.json")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.name = {folder} is a folder without a config.json: give a folder that save_pretrained wrote"
            )
        origin = Origin(settings.name, digest=folder_digest(folder))
    else:
        try:
            config = cached_file(settings.name, "config.json", revision=settings.revision)
        except OSError:
            adapter = cached_file(settings.name, "adapter_config.json", revision=settings.revision, **QUIET)
            if adapter:
                _refuse_adapter(settings.name, Path(adapter))
            raise
        origin = Origin(settings.name, commit=extract_commit_hash(config, None))
    # With an adapter_config.json transformers would load the base that it names.
    if found := _path_of(origin, "adapter_config.json"):
        _refuse_adapter(settings.name, found)
    return origin


def _refuse_adapter(name: str, file: Path) -> None:
    """Raise UserError if there is an adapter_config.json, naming the base in it."""
    if not file.is_file():
        return
    base = object_in(file).get("base_model_name_or_path")
    named = f", model.name={base}" if isinstance(base, str) and base else ""
    raise UserError(
        f"model.name = {name} is an adapter: give the model that it belongs to{named}; model.adapter={name} trains it "
        "further, and hapo_lite.evaluate and the inspector take an adapter's folder as --adapter"
    )


def may_run_code(settings: ModelSettings, origin: Origin) -> bool:
    """Whether code that comes with the model is run. If so, a warning is printed to standard error.

    Raises UserError if model.trust_remote_code is set but the code is not fixed: the revision is no commit, or the code
    comes from another repository.
    """
    if not settings.trust_remote_code:
        return False
    if origin.commit is not None and settings.revision != origin.commit:
        raise UserError(
            f"model.trust_remote_code with the hub name {origin.name} needs model.revision as a commit hash: a name or "
            f"branch can hold other code tomorrow. Today it is {origin.commit}; read its code, then set that"
        )
    for reference in _code_references(origin):
        repository, elsewhere, _ = reference.rpartition("--")
        if elsewhere and repository != origin.name:
            raise UserError(
                f"model.name = {origin.name} takes its code from {repository}, which can change at any time: make a "
                "folder with the model and that code, and give that as model.name"
            )
    print(
        f"warning: model.trust_remote_code is set: Python code of {origin.name} ({origin}) runs on this machine with "
        "your rights. It can read, change and send all that you can",
        file=sys.stderr,
    )
    return True


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names, sizes and contents of the files in a folder that a model is loaded from.

    Only a part of each large file is read. The digest tells different weights apart, but not a deliberate forgery.
    """
    together = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in LOADED and p.is_file()):
        together.update(json.dumps([path.name, path.stat().st_size]).encode())
        for piece in _pieces(path):
            together.update(piece)
    return together.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file that are hashed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            yield file.read()
            return
        for i in range(SAMPLES):
            file.seek((size - PIECE) * i // (SAMPLES - 1))
            yield file.read(PIECE)


def _code_references(origin: Origin) -> Iterator[str]:
    """Classes that the model's files ask to be loaded: `module.Class` or `repository--module.Class`."""
    for name in ("config.json", "tokenizer_config.json"):
        yield from re.findall(r'"([^"]*)"', json.dumps(_read(origin, name).get("auto_map")))


def _read(origin: Origin, name: str) -> dict[str, Any]:
    """The object in a JSON file of the model; empty if there is no such file."""
    path = _path_of(origin, name)
    return object_in(path) if path else {}


def _path_of(origin: Origin, name: str) -> Path | None:
    """A file of the model on this machine; None if the model has no such file."""
    path = cached_file(origin.name, name, revision=origin.commit, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file holds something else."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    return fields if isinstance(fields, dict) else {}
