"""Settings that fit a card: the largest micro-batch and sampling batch whose predicted peak stays below its memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from hapo_lite.errors import UserError, writing
from hapo_lite.recipe import Recipe
from hapo_lite.runs.files import replace_text
from hapo_lite.train.memory.predict import Predictor, Sizes, worst_case
from hapo_lite.train.memory.room import usable


@dataclass(frozen=True)
class Advice:
    """What fits. longest: the longest completion that would, one sequence at a time and one group sampled at once."""

    micro_batch_tokens: int
    batch_size: int
    max_new_tokens: int
    longest: int

    def settings(self) -> dict[str, int]:
        return {
            "training.micro_batch_tokens": self.micro_batch_tokens,
            "rollout.batch_size": self.batch_size,
            "rollout.max_new_tokens": self.max_new_tokens,
        }


def advise(predictor: Predictor, recipe: Recipe, card: int, factors: dict[str, float] | None = None) -> Advice:
    """factors: measured over predicted bytes of the rollout and the update, where they were measured.

    Memory grows by a line with sequences and tokens, so two predictions give the rest. Raises UserError if not even
    one sequence of 64 new tokens fits.
    """
    room, factors = usable(card), factors or {}
    sizes = worst_case(recipe, predictor.context)
    samples = recipe.rollout.completions_per_prompt
    completions = recipe.rollout.prompts_per_iteration * samples

    def update(completion: int, batch: int) -> float:
        width = sizes.prompt + completion
        stage = predictor.update(Sizes(sizes.prompt, completion, 1, 1, batch, width))
        return stage.total * factors.get("update", 1.0)

    def rollout(completion: int, rows: int) -> float:
        stage = predictor.rollout(recipe, Sizes(sizes.prompt, completion, rows, -(-rows // samples), 1, 1))
        if predictor.unpacks(recipe, stage, room=0):  # one that is made where it fits does not take part in what fits
            stage = stage.beside(predictor.unpacked)
        return stage.total * factors.get("rollout", 1.0)

    base = sizes.completion
    one, longer = update(base, 1), update(2 * base, 1)
    group, longer_group = rollout(base, samples), rollout(2 * base, samples)
    longest = predictor.context - sizes.prompt
    for at_base, at_twice in ((one, longer), (group, longer_group)):
        longest = min(longest, base + int((room - at_base) / max((at_twice - at_base) / base, 1e-9)))
    if longest < min(64, base):
        raise UserError(
            f"{recipe.model.name} does not fit {card / 2**30:.3g} GiB with these settings: try "
            "model.quantization=nf4, model.gradient_checkpointing=true, training.optimizer=paged_adamw_8bit, a lower "
            "data.max_prompt_tokens or rollout.completions_per_prompt, or a smaller model"
        )
    completion = base if longest >= base else longest // 64 * 64
    if completion < base:
        one, group = update(completion, 1), rollout(completion, samples)
    step = -(-completions // recipe.training.updates_per_iteration)
    batch = _largest(room, one, update(completion, 2) - one, 1, 1, step)
    rows = _largest(room, group, rollout(completion, 2 * samples) - group, samples, samples, completions)
    return Advice(batch * (sizes.prompt + completion), rows, completion, longest)


def _largest(room: float, first: float, slope: float, start: int, step: int, most: int) -> int:
    """start + k step, at most `most`, with first + k slope <= room."""
    return max(start, min(start + step * int((room - first) / max(slope, 1.0)), most))


def write_back(path: Path, settings: dict[str, int]) -> None:
    """Put `section.key` settings into a recipe file: all else in it stays as it is. Whole or not at all.

    PyYAML says where a value stands. A round trip through ruamel.yaml would lay out the rest anew (`null`, aligned
    columns, indents other than 2, flow mappings of several lines).

    Raises UserError if the file cannot be written or is laid out in a way that this cannot edit.
    """
    text = path.read_text(encoding="utf-8")
    wanted = yaml.safe_load(text)
    try:
        for dotted, value in settings.items():
            section, key = dotted.split(".")
            wanted.setdefault(section, {})[key] = value
            text = _with_setting(text, section, key, value)
        same = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        same = False
    if not same:
        raise UserError(f"{path} is laid out in a way that --write cannot edit: put the settings in by hand")
    with writing(path):
        replace_text(path, text)


def _with_setting(text: str, section: str, key: str, value: int) -> str:
    """`text` with the setting in it; unchanged where its section is empty."""
    sections = {name.value: node for name, node in yaml.compose(text, Loader=yaml.SafeLoader).value}
    if section not in sections:
        return f"{text.rstrip()}\n\n{section}:\n  {key}: {value}\n"
    entries = sections[section].value
    for name, old in entries:
        if name.value == key:
            return text[: old.start_mark.index] + str(value) + text[old.end_mark.index :]
    if not entries:
        return text
    first = entries[0][0].start_mark
    gap = ", " if sections[section].flow_style else "\n" + " " * first.column
    return f"{text[: first.index]}{key}: {value}{gap}{text[first.index :]}"
