"""Settings that fit a card: the largest micro-batch and sampling batch whose predicted peak stays below its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """The largest settings that fit. longest: tokens of the longest completion that would fit in batches of one.

    Those batches are one sequence per micro-batch and one group sampled at once. context_left: tokens that the model's
    context leaves for a completion after the longest prompt.
    """

    micro_batch_tokens: int
    batch_size: int
    max_new_tokens: int
    longest: int
    context_left: int

    def settings(self) -> dict[str, int]:
        """The settings by their names in a recipe."""
        return {
            "training.micro_batch_tokens": self.micro_batch_tokens,
            "rollout.batch_size": self.batch_size,
            "rollout.max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Peaks:
    """Bytes of the update and the rollout at their peaks, for any sizes. prompt: tokens of the longest prompt.

    factors: measured over predicted bytes by stage; 1 for a stage without a measurement.
    """

    predictor: Predictor
    recipe: Recipe
    prompt: int
    factors: dict[str, float]

    def update(self, completion: int, batch: int) -> float:
        """The update with micro-batches of `batch` sequences. completion: tokens."""
        stage = self.predictor.update(Sizes(self.prompt, completion, 1, 1, batch, self.prompt + completion))
        return stage.total * self.factors.get("update", 1.0)

    def rollout(self, completion: int, rows: int) -> float:
        """The rollout with `rows` completions sampled at once. completion: tokens."""
        prompts = math.ceil(rows / self.recipe.rollout.completions_per_prompt)
        stage = self.predictor.rollout(self.recipe, Sizes(self.prompt, completion, rows, prompts, 1, 1))
        # With room=0 only a copy of the base that the recipe insists on is counted.
        if self.predictor.unpacks(self.recipe, stage, room=0):
            stage = stage.beside(self.predictor.unpacked)
        return stage.total * self.factors.get("rollout", 1.0)


def advise(predictor: Predictor, recipe: Recipe, card: int, factors: dict[str, float] | None = None) -> Advice:
    """The largest settings that fit a card of `card` bytes. factors: as `Peaks` has them.

    The update's memory is linear in sequences and in tokens, so two predictions give all others. Raises UserError if
    not even one sequence of 64 new tokens fits.
    """
    room = usable(card)
    sizes = worst_case(recipe, predictor.context)
    samples = recipe.rollout.completions_per_prompt
    completions = recipe.rollout.prompts_per_iteration * samples
    peaks = Peaks(predictor, recipe, sizes.prompt, factors or {})
    base = sizes.completion
    one = peaks.update(base, 1)
    group = peaks.rollout(base, samples)
    context_left = predictor.context - sizes.prompt
    longest = min(
        context_left,
        _longest_completion(room, base, one, peaks.update(2 * base, 1)),
        _longest_completion(room, base, group, peaks.rollout(2 * base, samples)),
    )
    if longest < min(64, base):
        raise UserError(
            f"{recipe.model.name} does not fit {card / 2**30:.3g} GiB with these settings: try "
            "model.quantization=nf4, model.gradient_checkpointing=true, training.optimizer=paged_adamw_8bit, a lower "
            "data.max_prompt_tokens or rollout.completions_per_prompt, or a smaller model"
        )
    completion = base if longest >= base else longest // 64 * 64
    if recipe.reward.overlong_buffer >= completion:
        raise UserError(
            f"completions of at most {completion} tokens fit {card / 2**30:.3g} GiB, and reward.overlong_buffer = "
            f"{recipe.reward.overlong_buffer} must be smaller than that: lower it"
        )
    if completion < base:
        one = peaks.update(completion, 1)
    completions_per_step = math.ceil(completions / recipe.training.updates_per_iteration)
    batch = 1 + _units_that_fit(room, one, peaks.update(completion, 2))
    groups = _groups_that_fit(room, math.ceil(completions / samples), lambda n: peaks.rollout(completion, n * samples))
    batch = max(1, min(batch, completions_per_step))
    rows = max(samples, min(groups * samples, completions))
    return Advice(batch * (sizes.prompt + completion), rows, completion, longest, context_left)


def _longest_completion(room: float, base: int, at_base: float, at_twice: float) -> int:
    """Tokens of the longest completion in `room` bytes, from the bytes at `base` and at twice as many tokens."""
    per_token = max((at_twice - at_base) / base, 1e-9)
    return base + int((room - at_base) / per_token)


def _units_that_fit(room: float, at_one: float, at_two: float) -> int:
    """Number of sequences or groups that fit beside the first one, from the bytes with one and with two of them."""
    return int((room - at_one) / max(at_two - at_one, 1.0))


def _groups_that_fit(room: float, most: int, peak: Callable[[int], float]) -> int:
    """Groups that fit, from 1 to `most`. peak: bytes of the rollout with so many groups at once.

    The peak is that of reading the prompts or that of the last step, and each of them is linear in groups. So a line
    through two counts gives too many groups, and a line through the last two of these gives fewer, but not too few.
    """
    first = peak(1)
    count = min(most, 1 + max(0, _units_that_fit(room, first, peak(2))))
    while count > 1 and (excess := peak(count) - room) > 0:
        slope = max(peak(count) - peak(count - 1), 1.0)
        count = max(1, count - math.ceil(excess / slope))
    return count


def write_back(path: Path, settings: dict[str, int]) -> None:
    """Put `section.key` settings into a recipe file, whose other text stays as it is. Nothing is written on failure.

    PyYAML finds the place of a value. A round trip through ruamel.yaml would change the layout of the rest: `null`,
    aligned columns, indents other than 2, flow mappings of several lines. Raises UserError if the file cannot be
    written, or if its layout is one that this function cannot edit.
    """
    text = path.read_text(encoding="utf-8")
    wanted = yaml.safe_load(text)
    try:
        for dotted, value in settings.items():
            section, key = dotted.split(".")
            wanted.setdefault(section, {})[key] = value
            text = _with_setting(text, section, key, value)
        edited = yaml.safe_load(text) == wanted
    except yaml.YAMLError:
        edited = False
    if not edited:
        raise UserError(f"{path} is laid out in a way that --write cannot edit: put the settings in by hand")
    with writing(path):
        replace_text(path, text)


def _with_setting(text: str, section: str, key: str, value: int) -> str:
    """`text` with the setting in it; unchanged if its section is empty. Raises YAMLError."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return text
    sections = {name.value: node for name, node in root.value}
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
