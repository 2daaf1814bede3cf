"""Pass rates of prompts: the file that `hapo_lite.probe` writes, and the prompts that training chooses by it.

The first line of the file is the protocol, which is everything that the rates depend on. A line for each prompt
follows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError, counted
from hapo_lite.recipe import PassRateSettings
from hapo_lite.records import Prompt
from hapo_lite.runs.files import replace_text
from hapo_lite.tasks.store import Selection

PROBE = "python -m hapo_lite.probe"


@dataclass(frozen=True)
class PassRate:
    """How often a prompt was solved. prompt: its id; problem: a hash of its messages and its answer.

    right, attempts: completions; attempts is 0 for a prompt that was too long to be sampled. mean_length: tokens of a
    completion. truncated: completions that were cut off at the limit.
    """

    prompt: str
    problem: str
    right: int
    attempts: int
    mean_length: float
    truncated: int

    @property
    def rate(self) -> float:
        """Share of right completions; 0 if there were none."""
        return self.right / max(self.attempts, 1)


PassRates = Mapping[str, PassRate]
"""By the id of the prompt."""


def problem_hash(prompt: Prompt) -> str:
    """A hash of all that a completion and its grade depend on: the messages and the answer."""
    return hashlib.sha256(json.dumps([prompt.messages, prompt.answer]).encode()).hexdigest()[:16]


def write_pass_rates(path: Path, protocol: Mapping[str, Any], rates: Sequence[PassRate]) -> None:
    """Write the file as a whole. Raises OSError."""
    lines = [{"protocol": protocol}, *(asdict(rate) for rate in rates)]
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_pass_rates(path: Path) -> PassRates:
    """The pass rates in a file. Raises UserError if there is no such file, or if it is not one of pass rates."""
    try:
        # As bytes, since text also has lines end at characters that an id may hold, such as U+2028.
        first, *lines = path.read_bytes().splitlines()
        if "protocol" not in json.loads(first):
            raise ValueError("its first line has no protocol")
        rates = [PassRate(**json.loads(line)) for line in lines]
    except FileNotFoundError:
        raise UserError(f"data.pass_rate.file: there is no file {path}: {PROBE} RECIPE writes it") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"data.pass_rate.file: {path} is not a file of pass rates ({error}): give the pass_rates.jsonl that "
            f"{PROBE} has written"
        ) from None
    return {rate.prompt: rate for rate in rates}


@dataclass(frozen=True)
class Chosen:
    """The prompts to train on, with their pass rates."""

    prompts: Sequence[Prompt]
    rates: PassRates


def choose_by_pass_rate(prompts: Sequence[Prompt], settings: PassRateSettings, say: Callable[[str], None]) -> Chosen:
    """The prompts whose pass rate lies between the two bounds, which are included. How many were left out is said.

    A prompt that was too long for the probe is left out. Raises UserError if a prompt is not in the file, or if none is
    left.
    """
    rates = read_pass_rates(Path(settings.file))
    low, high = settings.between
    unknown: list[str] = []
    places: list[int] = []
    below = above = unsampled = 0
    for place, prompt in enumerate(prompts):
        rate = rates.get(prompt.id)
        if rate is None or rate.problem != problem_hash(prompt):
            unknown.append(prompt.id)
        elif rate.attempts == 0:
            unsampled += 1
        elif rate.rate < low:
            below += 1
        elif rate.rate > high:
            above += 1
        else:
            places.append(place)
    if unknown:
        named = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(
            f"data.pass_rate.file: {len(unknown):,} of {counted(len(prompts), 'training prompt')} "
            f"{'is' if len(unknown) == 1 else 'are'} not in {settings.file} with the same text and answer ({named}): "
            f"it is of other data or another data.system_prompt; {PROBE} with this recipe measures them"
        )
    counts = f"{below:,} below, {above:,} above" + (f", {unsampled:,} too long for the probe" if unsampled else "")
    if not places:
        raise UserError(
            f"data.pass_rate: no training prompt has a pass rate between {low:g} and {high:g} in {settings.file} "
            f"({counts}): widen data.pass_rate.between"
        )
    say(
        f"data: {len(places):,} of {counted(len(prompts), 'prompt')} have a pass rate between {low:g} and {high:g} "
        f"({counts})"
    )
    return Chosen(Selection(prompts, places), rates)
