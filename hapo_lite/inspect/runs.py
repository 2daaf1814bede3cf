"""A run's folder, read lazily: its settings, metrics and traces; nothing outside the folder is opened."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError
from hapo_lite.inspect.tokens import TREATED, TokenTable, token_table, treated_tokens
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.runs.files import inside
from hapo_lite.runs.status import read_status
from hapo_lite.runs.trace import Trace, salvage_traces

FILES_HELD = 8
"""Trace files whose tokens stay in memory; of the others only a line per completion does."""


def run_names(root: Path) -> list[str]:
    """The runs in a folder of runs, newest first: its children that hold traces or metrics."""
    if not root.is_dir():
        return []
    runs = [p for p in root.iterdir() if (p / "traces").is_dir() or (p / "metrics.jsonl").is_file()]
    return [p.name for p in sorted(runs, key=lambda p: p.stat().st_mtime, reverse=True)]


def open_run(root: Path, name: str) -> Run:
    """The run `name` in the folder of runs. Raises UserError if it is none, or leads out of the folder."""
    path = inside(root, root / name)
    if not name or path == root.resolve():
        raise UserError(f"{root} is a folder of runs: pick one of them")
    if not (path / "traces").is_dir() and not (path / "metrics.jsonl").is_file():
        raise UserError(f"{root / name} is no run: it has neither traces/ nor metrics.jsonl")
    return Run(root / name)


@dataclass(frozen=True)
class Entry:
    """What is remembered of one completion. place: which trace of its file.

    treated: the tokens that the update amplified, suppressed or clipped, as text with their counts; empty without one.
    """

    iteration: int
    place: int
    stage: str
    prompt_id: str
    sample: int
    outcome: str
    length: int
    treated: dict[str, Counter[str]]

    @property
    def title(self) -> str:
        return f"{self.stage} · {self.prompt_id[:80]} · {self.sample} · {self.outcome[:40]}"


@dataclass
class Run:
    """One run. Files are read when asked for, and again when they have changed, so a live run can be followed."""

    path: Path
    _held: OrderedDict[int, tuple[tuple[int, int], list[Trace], list[str]]] = field(default_factory=OrderedDict)
    _entries: dict[int, tuple[tuple[int, int], list[Entry], list[str]]] = field(default_factory=dict)

    def iterations(self) -> list[int]:
        """Iterations with a trace file, ascending."""
        return sorted(int(f.stem) for f in (self.path / "traces").glob("[0-9]*.jsonl") if f.stem.isdecimal())

    def traces(self, iteration: int) -> tuple[list[Trace], list[str]]:
        """An iteration's traces, and a sentence for every line that could not be read."""
        file = self._file(iteration)
        try:
            stamp = self.stamp(iteration)
        except (UserError, OSError) as error:
            return [], [str(error)]
        if iteration not in self._held or self._held[iteration][0] != stamp:
            traces, problems = salvage_traces(file)
            self._held[iteration] = (stamp, traces, problems)
            while len(self._held) > FILES_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(iteration)
        return self._held[iteration][1], self._held[iteration][2]

    def entries(self, iteration: int) -> tuple[list[Entry], list[str]]:
        """A line for each of an iteration's completions, and the sentences about the others."""
        try:
            stamp = self.stamp(iteration)
        except (UserError, OSError) as error:
            return [], [str(error)]
        if iteration not in self._entries or self._entries[iteration][0] != stamp:
            traces, problems = self.traces(iteration)
            entries = [_entry(trace, iteration, place) for place, trace in enumerate(traces)]
            self._entries[iteration] = (stamp, entries, problems)
        return self._entries[iteration][1], self._entries[iteration][2]

    def stamp(self, iteration: int) -> tuple[int, int]:
        """Changes when the iteration's file does. Raises UserError if it leads out of the folder, OSError if absent."""
        stat = inside(self.path, self._file(iteration)).stat()
        return stat.st_mtime_ns, stat.st_size

    def table(self, trace: Trace) -> TokenTable:
        """The trace's tokens under the run's method and temperature."""
        method, training, evaluation = self.settings
        base = evaluation if trace.stage == "eval" else training
        return token_table(trace, method, base, self.tokenizer)

    def table_of(self, entry: Entry) -> TokenTable:
        """Raises UserError if the file no longer holds the completion, as after a run went on from a checkpoint."""
        traces, _ = self.traces(entry.iteration)
        if entry.place >= len(traces):
            raise UserError(f"{self._file(entry.iteration)} has been written anew: refresh the page")
        return self.table(traces[entry.place])

    def prompts(self) -> dict[str, list[Entry]]:
        """Completions by prompt over the whole run, for the prompts that were met in several iterations."""
        found: dict[str, list[Entry]] = {}
        for iteration in self.iterations():
            for entry in self.entries(iteration)[0]:
                found.setdefault(f"{entry.stage}: {entry.prompt_id[:80]}", []).append(entry)
        return {name: entries for name, entries in found.items() if len({e.iteration for e in entries}) > 1}

    def metrics(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The lines of metrics.jsonl that are numbers by iteration, and a sentence for every other line."""
        lines: list[dict[str, Any]] = []
        problems: list[str] = []
        file = self.path / "metrics.jsonl"
        try:
            text = inside(self.path, file).read_text("utf-8")
        except (UserError, OSError, UnicodeDecodeError) as error:
            return [], [f"{file} cannot be read: {error}"]
        for number, line in enumerate(text.splitlines(), 1):
            try:
                fields = json.loads(line)
                if not math.isfinite(fields["iteration"]):
                    raise ValueError("no iteration")
                lines.append(fields)
            except (ValueError, KeyError, TypeError):
                problems.append(f"{file}:{number}: not a line of metrics")
        return lines, problems

    @property
    def settings(self) -> tuple[Method, float, float]:
        """Method, and base temperature of training and of evaluation; the defaults where there is no recipe."""
        recipe = self.recipe
        if recipe is None:
            return Method(), 1.0, 1.0
        return recipe.method, recipe.rollout.temperature, recipe.evaluation.temperature

    @property
    def recipe(self) -> Recipe | None:
        """The run's settings; None where recipe.yaml is missing or of another version."""
        return self._recipe_and_problems[0]

    @property
    def recipe_problems(self) -> list[str]:
        return self._recipe_and_problems[1]

    @property
    def doing(self) -> str:
        """What the run is doing, or did last, as a sentence; "" where it keeps no status."""
        try:
            doing = read_status(inside(self.path, self.path / "status.json"))
        except (UserError, OSError):
            return ""
        return f"{self.path.name}: {doing.stage}, iteration {doing.iteration}." if doing else ""

    @functools.cached_property
    def _recipe_and_problems(self) -> tuple[Recipe | None, list[str]]:
        try:
            return load_recipe(inside(self.path, self.path / "recipe.yaml")), []
        except (UserError, OSError) as error:
            return None, [f"{error} (HAPO's defaults are assumed)"]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The run's tokenizer where it is on this machine; texts then come from its ids."""
        recipe = self.recipe
        if recipe is None:
            return None
        name = str(TINY_MODEL) if recipe.model.name == "tiny" else recipe.model.name
        try:
            return AutoTokenizer.from_pretrained(
                name, revision=recipe.model.revision, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError):
            return None

    def _file(self, iteration: int) -> Path:
        return self.path / "traces" / f"{iteration:06d}.jsonl"


def treated_together(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """The treated tokens of several completions."""
    together: dict[str, Counter[str]] = {name: Counter() for name in TREATED}
    for entry in entries:
        for name, texts in entry.treated.items():
            together[name].update(texts)
    return together


def _entry(trace: Trace, iteration: int, place: int) -> Entry:
    texts = trace.tokens["text"]
    return Entry(
        iteration=iteration,
        place=place,
        stage=trace.stage,
        prompt_id=trace.prompt_id,
        sample=trace.sample,
        outcome=trace.outcome,
        length=len(texts),
        treated={name: Counter(texts[i] for i in found) for name, found in treated_tokens(trace).items()},
    )
