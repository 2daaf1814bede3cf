"""Named sets of problems. Each name stands for a public hub data set; NAME=FILE reads a local copy instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import DataSettings, Recipe, SuiteSettings
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.tasks.data import load_prompts
from hapo_lite.tasks.sources import HubUnavailable
from hapo_lite.tasks.store import origin_of
from hapo_lite.tiny.bundled import TASKS
from hapo_lite.train.prompts import load_data

NAMED: Mapping[str, dict[str, str]] = {
    "aime24": {"source": "HuggingFaceH4/aime_2024", "split": "train"},
    "aime25": {"source": "math-ai/aime25", "split": "test"},
    "amc23": {"source": "AI-MO/aimo-validation-amc", "split": "train"},
    "math500": {"source": "HuggingFaceH4/MATH-500", "split": "test"},
    "minerva": {"source": "math-ai/minervamath", "split": "test"},
    "olympiadbench": {
        "source": "Hothan/OlympiadBench",
        "config": "OE_TO_maths_en_COMP",
        "split": "train",
        "problem_column": "question",
        "answer_column": "final_answer",
    },
    "gsm8k": {"source": "openai/gsm8k", "config": "main", "split": "test"},
    **{name: {"source": name, "split": "test"} for name in TASKS},
}
PAPER = ("aime24", "aime25", "amc23", "math500", "olympiadbench", "minerva")
"""The six benchmarks of the paper (arXiv 2509.16591)."""
HELD_OUT = "held_out"
"""The run's own held-out prompts, those that training evaluates on."""


@dataclass(frozen=True)
class Problems:
    """The problems of a suite. source: their source in words; skipped: the number of unusable rows, by reason.

    left_out: sentences about these rows. origin: as in tasks.sources.Table.
    """

    name: str
    source: str
    prompts: Sequence[Prompt]
    skipped: Mapping[str, int]
    left_out: Sequence[str] = ()
    origin: str = ""


@dataclass(frozen=True)
class Suite:
    """The prompts of a suite that fit, in the order of the data.

    too_long: ids of the prompts that do not fit; most: the largest number of tokens that fits.
    """

    problems: Problems
    prompts: tuple[EncodedPrompt, ...]
    too_long: tuple[str, ...]
    most: int

    @property
    def name(self) -> str:
        return self.problems.name


def chosen(recipe: Recipe) -> tuple[SuiteSettings, ...]:
    """`benchmark.suites`, or the default: the built-in task for a run on it, else the paper's six benchmarks."""
    if recipe.benchmark.suites is not None:
        return recipe.benchmark.suites
    names = (recipe.data.source,) if recipe.data.source in TASKS else PAPER
    return tuple(SuiteSettings(name=name) for name in names)


def read_problems(settings: SuiteSettings, recipe: Recipe) -> Problems:
    """The suite's problems, with the recipe's system prompt. Raises UserError that names the suite."""
    name, limit = settings.name, recipe.benchmark.limit
    if settings.source is None and name == HELD_OUT:
        if recipe.evaluation.prompts == 0:
            raise UserError(
                f"suite {name}: evaluation.prompts is 0, so this recipe holds no prompts out: set it as it was for the "
                "run, or leave this suite out"
            )
        held_out = load_data(recipe.data, recipe.evaluation, recipe.seed, lambda text: None).held_out
        return Problems(name, "the run's held-out prompts", held_out[:limit], {})
    data = _data(settings, recipe)
    try:
        found = load_prompts(data)
    except HubUnavailable as error:
        raise UserError(f"suite {name}: {error.what}: {_instead_of_the_hub(settings, recipe)}") from error
    except UserError as error:
        copy = f" (a local copy: {name}=FILE)" if settings.source is None else ""
        raise UserError(f"suite {name}{copy}: {error}") from error
    where = [data.source] if Path(data.source).is_file() else [data.source, data.config, f"({data.split})"]
    source = " ".join(filter(None, where))
    return Problems(name, source, found.prompts, found.skipped, found.left_out(), origin_of(found.prompts))


def _instead_of_the_hub(settings: SuiteSettings, recipe: Recipe) -> str:
    """What to do about a suite whose hub data set cannot be loaded."""
    if settings.source is not None:
        return "check its source, config and split in benchmark.suites and the connection, or name a local file"
    chose = "neither --suite nor benchmark.suites names a suite, so the paper's six were taken; "
    return (
        f"{chose if recipe.benchmark.suites is None else ''}without the hub, --suite {HELD_OUT} asks the run's own "
        f"held-out prompts, and --suite {settings.name}=FILE reads a local copy"
    )


def _data(settings: SuiteSettings, recipe: Recipe) -> DataSettings:
    if settings.source is not None:
        source = settings.model_dump(exclude={"name"})
    elif settings.name in NAMED:
        source = dict(NAMED[settings.name])
    else:
        known = [*NAMED, HELD_OUT]
        close = difflib.get_close_matches(settings.name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"there is no suite {settings.name!r}: the names are {', '.join(known)}, and your own is a file or "
            f"NAME=FILE{hint}"
        )
    kept = recipe.data.model_dump(include={"system_prompt", "max_prompt_tokens"})
    return DataSettings(**source, **kept, limit=recipe.benchmark.limit)


def fit(
    problems: Problems,
    policy: Policy,
    max_prompt_tokens: int,
    max_new_tokens: int,
    setting: str = "benchmark.max_new_tokens",
) -> Suite:
    """Tokenise the problems, and leave out prompts that are too long by themselves or with a completion.

    setting: the one that limits completions. Raises UserError if no prompt is left.
    """
    encoded = [EncodedPrompt(i, p, tuple(policy.encode(p.chat()))) for i, p in enumerate(problems.prompts)]
    room = policy.context - max_new_tokens
    most = min(room, max_prompt_tokens)
    kept = tuple(e for e in encoded if len(e.ids) <= most)
    if not kept:
        shortest = min(len(e.ids) for e in encoded)
        raise UserError(
            f"suite {problems.name}: no prompt fits: the shortest has {shortest} tokens; data.max_prompt_tokens is "
            f"{max_prompt_tokens}, and completions of {max_new_tokens} leave {max(room, 0)} of the model's context of "
            f"{policy.context}: set {setting} lower"
        )
    return Suite(problems, kept, tuple(e.prompt.id for e in encoded if len(e.ids) > most), most)
