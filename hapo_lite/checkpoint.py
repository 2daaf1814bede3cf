"""Checkpoints: written aside, then renamed, so that a kill at any moment leaves the last good one.

A checkpoint is a folder `checkpoints/000010/` with the adapter (as peft writes it), `optimizer.pt`, and `state.json`:
the counters, the signal, and a hash of every file. Nothing in it is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError, disk_problem
from hapo_lite.policy import Policy

VERSION = 1
STATE, OPTIMIZER = "state.json", "optimizer.pt"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands between two iterations.

    iteration: completed ones; cursor: prompts taken from the stream; updates: optimiser steps; tokens: completion
    tokens sampled in training; seconds: of training so far; signal: the last iteration's, which the next one samples
    with.
    """

    iteration: int = 0
    cursor: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    signal: EntropySignal | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainState:
        signal = fields["signal"]
        return cls(**{**fields, "signal": EntropySignal(**signal) if signal else None})


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, scheduler: Any, state: TrainState, keep: int
) -> Path:
    """Write `folder/NNNNNN`, drop all but the newest `keep`. Raises UserError if the disk refuses; older ones stay."""
    final = folder / f"{state.iteration:06d}"
    if is_whole(final):
        return final
    aside = folder / f".writing-{final.name}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_adapter(policy, aside)
        # Through memory, so that a full disk is an OSError and not one of torch's own.
        buffer = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, buffer)
        (aside / OPTIMIZER).write_bytes(buffer.getbuffer())
        hashes = {f.name: file_hash(f) for f in sorted(aside.iterdir())}
        (aside / STATE).write_text(
            json.dumps({"version": VERSION, "files": hashes, "state": state.to_json()}, indent=1)
        )
        for file in aside.iterdir():
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"the checkpoint {final} could not be written: {disk_problem(error)}") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def save_adapter(policy: Policy, folder: Path) -> None:
    """The adapter as plain peft reads it."""
    # Without this, peft asks the hub whether the base's embedding was resized.
    policy.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("[0-9]*") if (p / STATE).is_file())


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer, scheduler: Any) -> TrainState:
    """Put the adapter, the optimiser and the schedule back, and return the state. Raises UserError on damage."""
    state = read_state(path)
    load_adapter(policy, path)
    saved = torch.load(path / OPTIMIZER, map_location=policy.device, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    return state


def load_adapter(policy: Policy, folder: Path) -> None:
    """Read adapter weights that `save_adapter` wrote into the policy."""
    outcome = set_peft_model_state_dict(policy.model, load_file(folder / "adapter_model.safetensors"))
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if missing or outcome.unexpected_keys:
        raise UserError(f"the adapter in {folder} does not fit this model and these model.lora settings")


def read_state(path: Path) -> TrainState:
    """Check a checkpoint's version and hashes. Raises UserError naming the file that is damaged."""
    try:
        record = json.loads((path / STATE).read_text())
        if record["version"] != VERSION:
            raise UserError(f"the checkpoint {path} has version {record['version']}; this program reads {VERSION}")
        for name, digest in record["files"].items():
            if file_hash(path / name) != digest:
                raise UserError(f"the checkpoint {path} is damaged: {name} has changed since it was written")
        return TrainState.from_json(record["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {type(error).__name__}: {error}") from error


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is there and undamaged."""
    try:
        read_state(path)
    except UserError:
        return False
    return True


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence about each newer one that is not."""
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        try:
            read_state(path)
            return path, complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
