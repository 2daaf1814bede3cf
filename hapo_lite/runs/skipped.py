"""Optimiser steps that were skipped because a number was not finite, and the files from which they are replayed.

A file such as `replay/000012-3.safetensors` holds the step's completions, their scores, and the adapter. Its header
holds the recipe and the reason as JSON. Nothing in the file is unpickled, and it needs no other file of the run.

Axes: B completions of the step, T tokens of one completion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from hapo_lite.records import Completion, EncodedPrompt, Experience, Graded, Prompt, Score
from hapo_lite.runs.files import replacing_file

VERSION = 1
KEPT = 5
"""Number of files, the newest ones, that are kept."""
SAMPLED = ("sampling_logp", "base_logp", "entropy", "temperature")
"""Fields of a Completion with one number per token."""
OPTIONAL = {"reference_logp": "base_logp"} | {name: name for name in ("factor", "drawn", "kept")}
"""Fields of an Experience with one number per token that may be None, and their names in a file."""
BY_TOKEN = {name: name for name in ("old_logp", "entropy", "h", "uncertain")} | OPTIONAL
"""All fields of an Experience with one number per token, and their names in a file."""


@dataclass(frozen=True)
class SkippedStep:
    """One skipped optimiser step. step: its number in the iteration, from 1; 0 stands for all steps of the iteration.

    graded: the completions; an Experience unless the non-finite number was found before they were scored. batches:
    micro-batches, as places in `graded`. denominator: of the step's loss. loss_scale: of fp16's scaler; 1 without one.
    """

    iteration: int
    step: int
    reason: str
    graded: Graded
    batches: list[list[int]]
    denominator: float = 1.0
    loss_scale: float = 1.0

    @property
    def experience(self) -> Experience | None:
        """The scored completions; None if they were not scored."""
        return self.graded if isinstance(self.graded, Experience) else None

    def only(self, members: Sequence[int]) -> SkippedStep:
        """The same step with the completions `members` alone, in that order."""
        place = {i: new for new, i in enumerate(members)}
        batches = [[place[i] for i in batch] for batch in self.batches]
        return replace(self, graded=self.graded.select(members), batches=batches)


def save_step(folder: Path, step: SkippedStep, adapter: Mapping[str, Tensor], recipe: Recipe) -> Path:
    """Write a step's file, and remove all but the newest files. Raises OSError or SafetensorError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step.iteration:06d}-{step.step}.safetensors"
    with replacing_file(path) as aside:
        save_file(_tensors(step, adapter), aside, {"step": json.dumps(_description(step, recipe))})
    by_number = sorted(folder.glob("[0-9]*-*.safetensors"), key=lambda f: tuple(map(int, f.stem.split("-"))))
    for old in by_number[:-KEPT]:
        old.unlink()
    return path


def _tensors(step: SkippedStep, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a step's file, by name."""
    completions, experience = step.graded.completions, step.experience
    tensors = {f"adapter.{name}": p.detach().contiguous().clone().cpu() for name, p in adapter.items()}
    tensors["prompt_ids"] = torch.cat([torch.tensor(c.prompt.ids, dtype=torch.long) for c in completions])
    tensors["ids"] = torch.cat([c.ids for c in completions])
    tensors["rewards"] = step.graded.rewards
    tensors |= {f"sampled.{name}": torch.cat([getattr(c, name) for c in completions]) for name in SAMPLED}
    if experience is not None:
        tensors["advantage"] = experience.advantage
        rows = {written: getattr(experience, name) for name, written in BY_TOKEN.items()}
        tensors |= {f"scored.{name}": torch.cat(values) for name, values in rows.items() if values is not None}
        tensors["scored.scale"] = experience.scale
    return {name: t.contiguous() for name, t in tensors.items()}


def _description(step: SkippedStep, recipe: Recipe) -> dict[str, Any]:
    """The JSON in the header of a step's file."""
    experience = step.experience
    return {
        "version": VERSION,
        "iteration": step.iteration,
        "step": step.step,
        "reason": step.reason,
        "batches": step.batches,
        "denominator": step.denominator,
        "loss_scale": step.loss_scale,
        "signal": asdict(experience.signal) if experience is not None else None,
        "completions": [
            {
                "prompt": asdict(c.prompt.prompt),
                "index": c.prompt.index,
                "prompt_length": len(c.prompt.ids),
                "sample": c.sample,
                "length": c.length,
                "text": c.text,
                "truncated": c.truncated,
                "correct": score.correct,
                "outcome": score.outcome,
                "answer": score.answer,
                "rewards": score.rewards,
            }
            for c, score in zip(step.graded.completions, step.graded.scores, strict=True)
        ],
        "recipe": recipe.model_dump(mode="json"),
    }


def drop_steps_after(folder: Path, iteration: int) -> None:
    """Remove the files of later iterations, which a resumed run writes again. Raises OSError."""
    for file in folder.glob("[0-9]*-*.safetensors"):
        if int(file.name.partition("-")[0]) > iteration:
            file.unlink()


@dataclass(frozen=True)
class SavedStep:
    """The content of a step's file. adapter: the adapter's tensors before the step, by name."""

    step: SkippedStep
    adapter: dict[str, Tensor]
    recipe: Recipe


def load_step(path: Path) -> SavedStep:
    """Read a step's file. Raises UserError if the file is missing, damaged or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if about["version"] != VERSION:
            raise UserError(f"{path} has version {about['version']}; this program reads {VERSION}")
        recipe = parse_recipe(about["recipe"], str(path))
        adapter = {n.removeprefix("adapter."): t for n, t in tensors.items() if n.startswith("adapter.")}
        return SavedStep(_step(about, tensors), adapter, recipe)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: skipped steps are in runs/NAME/replay/") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a skipped step that this program wrote, or is damaged ({type(error).__name__}: {error})"
        ) from None


def _step(about: dict[str, Any], tensors: dict[str, Tensor]) -> SkippedStep:
    """The step from its description and its tensors."""
    completions = _completions(about["completions"], tensors)
    scores = [
        # Files of an older version have the reward alone, or no rewards by name.
        Score(reward, c.get("correct", False), c.get("outcome", ""), c.get("answer"), c.get("rewards", {}))
        for reward, c in zip(tensors["rewards"].tolist(), about["completions"], strict=True)
    ]
    graded = Graded(completions, scores)
    if about["signal"]:
        lengths = [completion.length for completion in completions]
        by_token = {
            name: list(tensors[f"scored.{written}"].split(lengths))
            for name, written in BY_TOKEN.items()
            if f"scored.{written}" in tensors
        }
        graded = Experience(
            completions,
            scores,
            tensors["advantage"],
            by_token["old_logp"],
            by_token["entropy"],
            EntropySignal(**about["signal"]),
            h=by_token["h"],
            uncertain=by_token["uncertain"],
            scale=tensors["scored.scale"],
            **{name: by_token.get(name) for name in OPTIONAL},
        )
    return SkippedStep(
        about["iteration"],
        about["step"],
        about["reason"],
        graded,
        about["batches"],
        about["denominator"],
        about["loss_scale"],
    )


def _completions(about: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Completion]:
    """The completions from their descriptions and their tensors."""
    lengths = [c["length"] for c in about]
    ids = tensors["ids"].split(lengths)
    sampled = {name: tensors[f"sampled.{name}"].split(lengths) for name in SAMPLED}
    prompt_ids = tensors["prompt_ids"].split([c["prompt_length"] for c in about])
    completions = []
    for i, c in enumerate(about):
        messages = tuple((role, content) for role, content in c["prompt"]["messages"])
        prompt = Prompt(c["prompt"]["id"], messages, c["prompt"]["answer"], columns=c["prompt"].get("columns", {}))
        completions.append(
            Completion(
                EncodedPrompt(c["index"], prompt, tuple(prompt_ids[i].tolist())),
                c["sample"],
                ids[i],
                c["text"],
                c["truncated"],
                **{name: rows[i] for name, rows in sampled.items()},
            )
        )
    return completions
