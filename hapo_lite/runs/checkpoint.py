"""Checkpoints, which are written aside and then renamed, so that a kill at any moment leaves the last good one.

A checkpoint is a folder such as `checkpoints/000010/` with the adapter (in peft's format), `optimizer.pt` and
`state.json`. The latter holds the counters, the signal, the recipe, a digest of the prompts, the origins of model and
data, and a hash of every file and of itself. Nothing in a checkpoint is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError, disk_problem
from hapo_lite.model.adapter import load_adapter, save_adapter
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe, first_incompatible_setting
from hapo_lite.records import Standing
from hapo_lite.runs.files import file_hash, replacing_folder

VERSION = 2
STATE = "state.json"
OPTIMIZER = "optimizer.pt"


class PromptSource(Protocol):
    """The training prompts. digest: changes if any prompt changes. origin: where the data come from."""

    digest: str
    origin: str


@dataclass(frozen=True)
class TrainState:
    """The state of a run between two iterations.

    iteration: number of completed iterations. cursor: prompts taken from the stream. updates: optimiser steps taken.
    tokens: completion tokens sampled in training. seconds: training time so far. signal: the last iteration's; the next
    iteration samples with it. skipped_in_a_row: skipped optimiser steps since the last one that was taken.
    started_from: as in `Policy`, at the first start of the run. standings: of the prompts that the run has sampled, by
    id; empty where no setting asks for them.
    """

    iteration: int = 0
    cursor: int = 0
    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    signal: EntropySignal | None = None
    skipped_in_a_row: int = 0
    started_from: str = ""
    standings: Mapping[str, Standing] = field(default_factory=dict)

    def after_rollout(self, prompts_used: int, tokens_sampled: int) -> TrainState:
        """The state after an iteration's rollout."""
        return dataclasses.replace(self, cursor=self.cursor + prompts_used, tokens=self.tokens + tokens_sampled)

    def after_updates(self, signal: EntropySignal, taken: int, skipped_in_a_row: int) -> TrainState:
        """The state after an iteration's updates, of which `taken` were taken."""
        return dataclasses.replace(self, signal=signal, updates=self.updates + taken, skipped_in_a_row=skipped_in_a_row)

    def to_json(self) -> dict[str, Any]:
        """The fields, for a checkpoint's state.json."""
        fields = dataclasses.asdict(self)
        # Without them the record is that of versions that knew no standings.
        if not fields["standings"]:
            del fields["standings"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainState:
        """The state from the result of `to_json`."""
        signal = fields["signal"]
        standings = {name: Standing(*values) for name, values in fields.get("standings", {}).items()}
        return cls(**{**fields, "signal": EntropySignal(**signal) if signal else None, "standings": standings})


@dataclass(frozen=True)
class RunParts:
    """The objects that a checkpoint saves and restores, besides the state.

    optimizer: as accelerate prepared it. prompts: a checkpoint records their digest, since a resumed run must have the
    same prompts.
    """

    policy: Policy
    optimizer: Any
    scheduler: Any
    prompts: PromptSource

    def origins(self, state: TrainState) -> dict[str, str]:
        """What the model, the data and, if the run went on from one, the adapter were when the run loaded them."""
        origins = {"model": self.policy.origin, "data": self.prompts.origin}
        return origins | ({"adapter": state.started_from} if state.started_from else {})


def save_checkpoint(folder: Path, parts: RunParts, state: TrainState, recipe: Recipe) -> Path:
    """Write `folder/NNNNNN`, and remove all but the newest checkpoints.

    A good checkpoint of the same iteration is not written again. Raises UserError if the disk is full or cannot be
    written; older checkpoints then stay.
    """
    policy, optimizer, prompts = parts.policy, parts.optimizer, parts.prompts
    final = folder / f"{state.iteration:06d}"
    with contextlib.suppress(UserError):  # It is not there, or not good.
        usable_by(final, recipe)
        return final
    try:
        with replacing_folder(final) as aside:
            save_adapter(policy, aside)
            # torch writes into memory, since on a full disk it would raise an error of its own instead of OSError.
            buffer = io.BytesIO()
            states = {"optimizer": optimizer, "scheduler": parts.scheduler, "scaler": optimizer.scaler}
            torch.save({name: part.state_dict() for name, part in states.items() if part is not None}, buffer)
            (aside / OPTIMIZER).write_bytes(buffer.getbuffer())
            record = {
                "version": VERSION,
                "state": state.to_json(),
                "recipe": recipe.model_dump(mode="json"),
                "prompts": prompts.digest,
                "origins": parts.origins(state),
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
    """All checkpoints, oldest first, including damaged ones."""
    return sorted(folder.glob("[0-9]*"))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. path: its folder. record: its state.json."""

    path: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """The checkpoint in a folder, after `read_record`'s checks. Raises UserError as that does."""
        return cls(path, read_record(path))


def load_checkpoint(checkpoint: Checkpoint, parts: RunParts) -> TrainState:
    """Restore the adapter, the optimiser and the schedule, and return the state.

    Raises UserError if the base model or the training prompts have changed.
    """
    policy, optimizer, prompts = parts.policy, parts.optimizer, parts.prompts
    path, record = checkpoint.path, checkpoint.record
    then = record.get("origins", {"model": policy.origin, "data": ""})
    if then["model"] != policy.origin:
        raise UserError(_other("base model is another", "model", path, then["model"], policy.origin))
    if record["prompts"] != prompts.digest:
        raise UserError(_other("training prompts are others", "data", path, then["data"], prompts.origin))
    load_adapter(policy, path)
    # The optimiser moves its states to the parameters. Moved by torch.load, they would also keep the mark of a page.
    saved = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    _return_to_pages(optimizer.optimizer)
    parts.scheduler.load_state_dict(saved["scheduler"])
    # A run that began in bf16 or fp32 has no scaler. It may go on in fp16, on a card without bf16.
    if optimizer.scaler is not None and "scaler" in saved:
        optimizer.scaler.load_state_dict(saved["scaler"])
    return TrainState.from_json(record["state"])


def _return_to_pages(optimizer: Any) -> None:
    """Put the loaded states of a paged optimiser of bitsandbytes into pages of its own; other optimisers stay.

    A page is memory that the driver moves between card and machine, and bitsandbytes marks it with an attribute. The
    mark is saved with the tensor and the memory is not. Before a step the library prefetches all that bears the mark,
    and ends the process if it is ordinary memory (bitsandbytes 0.50).
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state[name]
            state[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype).copy_(loaded)


def _other(what: str, section: str, path: Path, then: str, now: str) -> str:
    """The sentence about a model or data that changed since a checkpoint. then, now: origins as origins.py writes them.

    what: such as "base model is another". section: of the recipe.
    """
    changed = f" ({then}, now {now})" if then != now else ""
    back = f"put the {section} back as it was"
    if then != now and then.startswith("commit "):
        back = f"set {section}.revision={then.removeprefix('commit ')}"
    return (
        f"the {what} than when {path} was written{changed}: {back} to go on, or choose another name= to start a new run"
    )


def read_record(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, after a check of its version and every hash. Raises UserError naming the problem."""
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


def usable_by(path: Path, recipe: Recipe) -> Checkpoint:
    """The checkpoint in a folder. Raises UserError with the reason if a run of `recipe` cannot go on from it."""
    checkpoint = Checkpoint.read(path)
    if changed := first_incompatible_setting(checkpoint.record["recipe"], recipe):
        raise UserError(f"the checkpoint {path} is of another recipe: it was made with {changed}")
    return checkpoint


def newest_good(folder: Path, recipe: Recipe) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that a run of `recipe` can go on from, and a sentence about each newer one."""
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return usable_by(path, recipe), complaints
        except UserError as error:
            complaints.append(str(error))
    return None, complaints


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
