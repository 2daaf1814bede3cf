"""Where a model or data set comes from: which commit or which files, and whether code that it brings may run.

A hub name can stand for something else tomorrow, so it is resolved to a commit once, and all is loaded from that.
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

TINY_MODEL = Path(__file__).parents[1] / "tiny" / "model"
"""The bundled model's folder, which `model.name: tiny` stands for."""
HASHED_WHOLE = 64 << 20
"""Bytes of a file up to which all of it is hashed; of a larger one its size and `SAMPLES` pieces."""
LOADED = (".json", ".safetensors", ".txt", ".model", ".tiktoken", ".jinja", ".py")
SAMPLES, PIECE = 64, 1 << 16


@dataclass(frozen=True)
class Origin:
    """name: hub name or folder, as transformers takes it; commit: of a hub name; digest: of a folder's files."""

    name: str
    commit: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        return f"commit {self.commit}" if self.commit else f"files {self.digest}"


def model_origin(settings: ModelSettings) -> Origin:
    """What `model.name` and `model.revision` stand for now.

    Raises UserError where it is no model, and what transformers raises where there is none or no hub.
    """
    if settings.name == "tiny":
        return Origin(str(TINY_MODEL), digest=folder_digest(TINY_MODEL))
    folder = Path(settings.name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model.name = {folder} is a folder without a config.json: give a folder that save_pretrained wrote"
            )
        origin = Origin(settings.name, digest=folder_digest(folder))
    else:
        config = cached_file(settings.name, "config.json", revision=settings.revision)
        origin = Origin(settings.name, commit=extract_commit_hash(config, None))
    # transformers would load the base that its adapter_config.json names instead, whatever that is.
    if _read(origin, "adapter_config.json"):
        raise UserError(f"model.name = {origin.name} is an adapter: give the model that it belongs to")
    return origin


def may_run_code(settings: ModelSettings, origin: Origin) -> bool:
    """Whether code that the model brings is run; if so, a warning on standard error.

    Raises UserError where model.trust_remote_code is set and it is open whose code that would be.
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
    """SHA-256 over the names and contents of those files of a folder that a model is loaded from.

    Tells weights from other weights, not from ones that were made to look alike: of large files it reads a part.
    """
    together = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in LOADED and p.is_file()):
        together.update(json.dumps([path.name, path.stat().st_size]).encode())
        for piece in _pieces(path):
            together.update(piece)
    return together.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASHED_WHOLE:
            yield file.read()
            return
        for i in range(SAMPLES):
            file.seek((size - PIECE) * i // (SAMPLES - 1))
            yield file.read(PIECE)


def _code_references(origin: Origin) -> Iterator[str]:
    """Classes that the model's files name as their own, as `module.Class` or `repository--module.Class`."""
    for name in ("config.json", "tokenizer_config.json"):
        yield from re.findall(r'"([^"]*)"', json.dumps(_read(origin, name).get("auto_map")))


def _read(origin: Origin, name: str) -> dict[str, Any]:
    """A JSON file of the model; empty where there is none."""
    path = cached_file(origin.name, name, revision=origin.commit, _raise_exceptions_for_missing_entries=False)
    fields = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    return fields if isinstance(fields, dict) else {}
