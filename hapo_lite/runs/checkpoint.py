"""Checkpoints: written aside, then renamed, so that a kill at any moment leaves the last good one.

A checkpoint is a folder `checkpoints/000010/` with the adapter (as peft writes it), `optimizer.pt`, and `state.json`:
the counters, the signal, the recipe, a digest of the prompts, what model and data came from, and a hash of every file
and of itself. Nothing in it is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError, disk_problem
from hapo_lite.model.adapter import load_adapter, save_adapter
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe, departure
from hapo_lite.runs.files import file_hash, replacing_folder

VERSION = 2
STATE, OPTIMIZER = "state.json", "optimizer.pt"


class PromptSource(Protocol):
    """The training prompts, as far as a checkpoint knows them. digest: changes with any of them. origin: where from."""

    digest: str
    origin: str


@dataclass(frozen=True)
class TrainState:
    """Where a run stands between two iterations.

    iteration: completed ones; cursor: prompts taken from the stream; updates: optimiser steps; tokens: completion
    tokens sampled in training; seconds: of training so far; signal: the last iteration's, which the next one samples
    with; skipped_in_a_row: optimiser steps, up to the last one.
    """

    iteration: int = 0
    cursor: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    signal: EntropySignal | None = None
    skipped_in_a_row: int = 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainState:
        signal = fields["signal"]
        return cls(**{**fields, "signal": EntropySignal(**signal) if signal else None})


def save_checkpoint(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: TrainState,
    recipe: Recipe,
    stream: PromptSource,
) -> Path:
    """Write `folder/NNNNNN` and drop all but the newest ones. Raises UserError if the disk refuses; older ones stay.

    stream: the training prompts, which a resumed run must find the same, as it must the base model.
    """
    final = folder / f"{state.iteration:06d}"
    if problem_of(final, recipe) is None:
        return final
    try:
        with replacing_folder(final) as aside:
            save_adapter(policy, aside)
            # Through memory, so that a full disk is an OSError and not one of torch's own.
            buffer = io.BytesIO()
            states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": optimizer.scaler}
            torch.save({name: part.state_dict() for name, part in states.items() if part is not None}, buffer)
            (aside / OPTIMIZER).write_bytes(buffer.getbuffer())
            record = {
                "version": VERSION,
                "state": state.to_json(),
                "recipe": recipe.model_dump(mode="json"),
                "prompts": stream.digest,
                "origins": {"model": policy.origin, "data": stream.origin},
                "files": {f.name: file_hash(f) for f in sorted(aside.iterdir())},
            }
            (aside / STATE).write_text(json.dumps(record | {"sha256": _digest(record)}, indent=1))
        up_to_here = [path for path in list_checkpoints(folder) if path.name <= final.name]
        for old in [*up_to_here[: -recipe.checkpoint.keep], *folder.glob(".writing-*")]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint {final} could not be written: {disk_problem(error)}") from error
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, damaged ones too, oldest first."""
    return sorted(folder.glob("[0-9]*"))


def load_checkpoint(
    path: Path, policy: Policy, optimizer: torch.optim.Optimizer, scheduler: Any, stream: PromptSource
) -> TrainState:
    """Put the adapter, the optimiser and the schedule back, and return the state.

    Raises UserError on damage, or if the base model or the training prompts are others than they were.
    """
    record = read_record(path)
    then = record.get("origins", {"model": policy.origin, "data": ""})
    if then["model"] != policy.origin:
        raise UserError(_other("base model is another", "model", path, then["model"], policy.origin))
    if record["prompts"] != stream.digest:
        raise UserError(_other("training prompts are others", "data", path, then["data"], stream.origin))
    load_adapter(policy, path)
    saved = torch.load(path / OPTIMIZER, map_location=policy.device, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    # A run that began in bf16 or fp32 has none; it may go on in fp16, on a card without bf16.
    if optimizer.scaler is not None and "scaler" in saved:
        optimizer.scaler.load_state_dict(saved["scaler"])
    return TrainState.from_json(record["state"])


def _other(what: str, section: str, path: Path, then: str, now: str) -> str:
    """The sentence for what has changed since a checkpoint; origins as origins.py writes them."""
    commit = then.removeprefix("commit ") if then != now else then
    back = f"set {section}.revision={commit}" if commit != then else f"put the {section} back as it was"
    changed = f" ({then}, now {now})" if then != now else ""
    return (
        f"the {what} than when {path} was written{changed}: {back} to go on, or choose another name= to start a new run"
    )


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, its version and every hash checked. Raises UserError naming what is not right."""
    try:
        record = json.loads((path / STATE).read_text())
        if record["version"] != VERSION:
            raise UserError(f"the checkpoint {path} has version {record['version']}; this program reads {VERSION}")
        if record.pop("sha256") != _digest(record):
            raise UserError(f"the checkpoint {path} is damaged: {STATE} has changed since it was written")
        for name, digest in record["files"].items():
            if file_hash(path / name) != digest:
                raise UserError(f"the checkpoint {path} is damaged: {name} has changed since it was written")
        return record
    except FileNotFoundError as error:
        raise UserError(f"the checkpoint {path} is damaged: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint {path} is damaged: {type(error).__name__}: {error}") from error


def problem_of(path: Path, recipe: Recipe) -> str | None:
    """Why a run of `recipe` cannot go on from a checkpoint; None where it can."""
    try:
        changed = departure(read_record(path)["recipe"], recipe)
    except UserError as error:
        return str(error)
    return f"the checkpoint {path} is of another recipe: it was made with {changed}" if changed else None


def newest_good(folder: Path, recipe: Recipe) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that a run of `recipe` can go on from, and a sentence about each newer one."""
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        problem = problem_of(path, recipe)
        if problem is None:
            return path, complaints
        complaints.append(problem)
    return None, complaints


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
