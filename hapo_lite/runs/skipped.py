"""Optimiser steps that were not taken because a number was not finite, and the files that they can be replayed from.

A file is `replay/000012-3.safetensors`: the completions of the step, what was known of them, the adapter, and as JSON
in the file's header the recipe and the reason. Nothing in it is unpickled, and it needs no other file of the run.

Axes: B completions of the step, T tokens of one completion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError
from hapo_lite.recipe import Recipe, parse_recipe
from hapo_lite.records import Completion, EncodedPrompt, Prompt, Scored
from hapo_lite.runs.files import replacing_file

VERSION = 1
KEPT = 5
"""Newest files that stay."""
SAMPLED = ("sampling_logp", "base_logp", "entropy", "temperature")
BY_TOKEN = ("old_logp", "entropy", "h", "uncertain", "base_logp")


@dataclass(frozen=True)
class SkippedStep:
    """One step. step: from 1 in its iteration; 0: all steps of the iteration, for what was found before the first.

    batches: micro-batches as places in `completions`. rewards, advantage: [B]; advantage, scored: None if they were not
    known yet. loss_scale: of fp16's scaler; 1 without one.
    """

    iteration: int
    step: int
    reason: str
    completions: list[Completion]
    rewards: Tensor
    advantage: Tensor | None
    scored: Scored | None
    batches: list[list[int]]
    denominator: float = 1.0
    loss_scale: float = 1.0

    def only(self, members: Sequence[int]) -> SkippedStep:
        """The same step with no other completions than `members`, in that order."""
        place = {i: new for new, i in enumerate(members)}
        scored = self.scored
        if scored is not None:
            rows = {name: getattr(scored, name) for name in BY_TOKEN}
            chosen = {name: values and [values[i] for i in members] for name, values in rows.items()}
            scored = replace(scored, scale=scored.scale[members], **chosen)
        return replace(
            self,
            completions=[self.completions[i] for i in members],
            rewards=self.rewards[members],
            advantage=None if self.advantage is None else self.advantage[members],
            scored=scored,
            batches=[[place[i] for i in batch] for batch in self.batches],
        )


def save_step(folder: Path, step: SkippedStep, adapter: dict[str, Tensor], recipe: Recipe) -> Path:
    """Write a step's file and drop all but the newest few. Raises OSError or SafetensorError."""
    completions = step.completions
    tensors = {f"adapter.{name}": p.detach().contiguous().clone().cpu() for name, p in adapter.items()}
    tensors["prompt_ids"] = torch.cat([torch.tensor(c.prompt.ids, dtype=torch.long) for c in completions])
    tensors["ids"] = torch.cat([c.ids for c in completions])
    tensors["rewards"] = step.rewards
    tensors |= {f"sampled.{name}": torch.cat([getattr(c, name) for c in completions]) for name in SAMPLED}
    if step.advantage is not None:
        tensors["advantage"] = step.advantage
    if step.scored is not None:
        rows = {name: getattr(step.scored, name) for name in BY_TOKEN}
        tensors |= {f"scored.{name}": torch.cat(values) for name, values in rows.items() if values is not None}
        tensors["scored.scale"] = step.scored.scale
    about = {
        "version": VERSION,
        "iteration": step.iteration,
        "step": step.step,
        "reason": step.reason,
        "batches": step.batches,
        "denominator": step.denominator,
        "loss_scale": step.loss_scale,
        "signal": asdict(step.scored.signal) if step.scored else None,
        "completions": [
            {
                "prompt": asdict(c.prompt.prompt),
                "index": c.prompt.index,
                "prompt_length": len(c.prompt.ids),
                "sample": c.sample,
                "length": c.length,
                "text": c.text,
                "truncated": c.truncated,
            }
            for c in completions
        ],
        "recipe": recipe.model_dump(mode="json"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step.iteration:06d}-{step.step}.safetensors"
    with replacing_file(path) as aside:
        save_file({name: t.contiguous() for name, t in tensors.items()}, aside, {"step": json.dumps(about)})
    by_number = sorted(folder.glob("[0-9]*-*.safetensors"), key=lambda f: tuple(map(int, f.stem.split("-"))))
    for old in by_number[:-KEPT]:
        old.unlink()
    return path


def drop_steps_after(folder: Path, iteration: int) -> None:
    """Remove what a resumed run will write again."""
    for file in folder.glob("[0-9]*-*.safetensors"):
        if int(file.name.partition("-")[0]) > iteration:
            file.unlink()


def load_step(path: Path) -> tuple[SkippedStep, dict[str, Tensor], Recipe]:
    """The step, the adapter's tensors by name, and the recipe. Raises UserError if the file is not of this kind."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if about["version"] != VERSION:
            raise UserError(f"{path} has version {about['version']}; this program reads {VERSION}")
        recipe = parse_recipe(about["recipe"], str(path))
        adapter = {n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")}
        return _step(about, tensors), adapter, recipe
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: skipped steps are in runs/NAME/replay/") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a skipped step that this program wrote, or is damaged ({type(error).__name__}: {error})"
        ) from None


def _step(about: dict[str, Any], tensors: dict[str, Tensor]) -> SkippedStep:
    each = about["completions"]
    lengths = [c["length"] for c in each]

    def rows(name: str) -> Sequence[Tensor]:
        return tensors[name].split(lengths)

    prompts = tensors["prompt_ids"].split([c["prompt_length"] for c in each])
    completions = []
    for i, c in enumerate(each):
        messages = tuple((role, content) for role, content in c["prompt"]["messages"])
        prompt = Prompt(c["prompt"]["id"], messages, c["prompt"]["answer"])
        completions.append(
            Completion(
                EncodedPrompt(c["index"], prompt, tuple(prompts[i].tolist())),
                c["sample"],
                rows("ids")[i],
                c["text"],
                c["truncated"],
                **{name: rows(f"sampled.{name}")[i] for name in SAMPLED},
            )
        )
    scored = None
    if about["signal"]:
        fields = {n: list(rows(f"scored.{n}")) if f"scored.{n}" in tensors else None for n in BY_TOKEN}
        scored = Scored(signal=EntropySignal(**about["signal"]), scale=tensors["scored.scale"], **fields)
    return SkippedStep(
        about["iteration"],
        about["step"],
        about["reason"],
        completions,
        tensors["rewards"],
        tensors.get("advantage"),
        scored,
        about["batches"],
        about["denominator"],
        about["loss_scale"],
    )
