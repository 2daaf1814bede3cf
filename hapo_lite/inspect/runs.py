"""A run's folder, read when asked: its settings, metrics and traces. No file outside the folder is opened."""

from __future__ import annotations

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError
from hapo_lite.inspect.metrics_log import MetricsLog
from hapo_lite.inspect.tokens import TREATED, TokenTable, token_table, treated_tokens
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.runs.files import inside
from hapo_lite.runs.status import read_status
from hapo_lite.runs.trace import Trace, salvage_traces, trace_file
from hapo_lite.tiny.bundled import loadable

FILES_HELD = 8
"""Trace files whose tokens stay in memory. For the other files, only an Entry per completion stays."""
MOST_LOOKED_AT = 30
"""Iterations that are searched for one with something to show."""
LONGEST_QUESTION = 400
"""Characters of a prompt that an Entry keeps."""


def run_names(root: Path) -> list[str]:
    """The names of the runs in a folder, newest first. A run is a subfolder that holds traces or metrics."""
    if not root.is_dir():
        return []
    runs = [p for p in root.iterdir() if (p / "traces").is_dir() or (p / "metrics.jsonl").is_file()]
    return [p.name for p in sorted(runs, key=lambda p: p.stat().st_mtime, reverse=True)]


def open_run(root: Path, name: str, files: RunFiles | None = None) -> Run:
    """The run `name` in the folder of runs. Raises UserError if it is not a run, or leads out of the folder.

    files: what other pages have read of it.
    """
    path = inside(root, root / name)
    if not name or path == root.resolve():
        raise UserError(f"{root} is a folder of runs: pick one of them")
    if not (path / "traces").is_dir() and not (path / "metrics.jsonl").is_file():
        raise UserError(f"{root / name} is no run: it has neither traces/ nor metrics.jsonl")
    return Run(root / name, files)


@dataclass(frozen=True)
class Entry:
    """A summary of one completion that stays in memory. place: the number of its trace in the file.

    length: tokens. treated: for each treatment (amplified, suppressed or clipped), the texts of its tokens with their
    counts; empty if the completion took part in no update. question: the beginning of the last message of its prompt.
    entropy: mean over its tokens, nats. trained: whether it had an advantage in an update. reward, rewards, group_size,
    group_correct: as in Trace.
    """

    iteration: int
    place: int
    stage: str
    prompt_id: str
    sample: int
    outcome: str
    length: int
    treated: dict[str, Counter[str]]
    question: str = ""
    entropy: float = 0.0
    trained: bool = False
    reward: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    group_size: int = 0
    group_correct: int = 0


Stamp = tuple[int, int]
"""Modification time, ns, and size, bytes, of a file."""


@dataclass(frozen=True)
class FileTraces:
    """The traces of a file. problems: a sentence for every line that could not be read."""

    stamp: Stamp
    traces: list[Trace]
    problems: list[str]


@dataclass(frozen=True)
class FileEntries:
    """The entries of a trace file. problems: a sentence for every line that could not be read."""

    stamp: Stamp
    entries: list[Entry]
    problems: list[str]


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that its tables need. The temperatures are the base temperatures."""

    method: Method = field(default_factory=Method)
    training_temperature: float = 1.0
    evaluation_temperature: float = 1.0


class RunFiles:
    """Holds what has been read of a run's files. The pages that show the run share it, each in its own thread."""

    def __init__(self, path: Path) -> None:
        self.traces: OrderedDict[int, FileTraces] = OrderedDict()
        self.entries: dict[int, FileEntries] = {}
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.lock = threading.RLock()


class Run:
    """One run. A file is read when asked for, and again when it has changed, so a live run can be followed.

    files: what other pages have read of it; None: nothing.
    """

    def __init__(self, path: Path, files: RunFiles | None = None) -> None:
        self.path = path
        self.files = files or RunFiles(path)

    def telling_iteration(self) -> int | None:
        """The last iteration with a completion that had an advantage, among the last MOST_LOOKED_AT; else the last one.

        An iteration in which all groups had equal rewards has nothing to show. None if no iteration has traces.
        """
        iterations = self.iterations()
        for iteration in reversed(iterations[-MOST_LOOKED_AT:]):
            if any(entry.trained for entry in self.entries(iteration)[0]):
                return iteration
        return iterations[-1] if iterations else None

    def iterations(self) -> list[int]:
        """The iterations that have a trace file, ascending."""
        return sorted(int(f.stem) for f in (self.path / "traces").glob("[0-9]*.jsonl") if f.stem.isdecimal())

    def traces(self, iteration: int) -> tuple[list[Trace], list[str]]:
        """An iteration's traces, and a sentence for every line that could not be read."""
        file = self._file(iteration)
        try:
            stamp = self.stamp(iteration)
        except (UserError, OSError) as error:
            return [], [str(error)]
        known = self.files.traces
        with self.files.lock:
            held = known.get(iteration)
            if held is None or held.stamp != stamp:
                traces, problems = salvage_traces(file)
                held = known[iteration] = FileTraces(stamp, traces, problems)
                while len(known) > FILES_HELD:
                    known.popitem(last=False)
            known.move_to_end(iteration)
        return held.traces, held.problems

    def entries(self, iteration: int) -> tuple[list[Entry], list[str]]:
        """An iteration's entries, and a sentence for every line that could not be read."""
        try:
            stamp = self.stamp(iteration)
        except (UserError, OSError) as error:
            return [], [str(error)]
        with self.files.lock:
            held = self.files.entries.get(iteration)
            if held is None or held.stamp != stamp:
                traces, problems = self.traces(iteration)
                entries = [entry_of(trace, iteration, place) for place, trace in enumerate(traces)]
                held = self.files.entries[iteration] = FileEntries(stamp, entries, problems)
        return held.entries, held.problems

    def stamp(self, iteration: int) -> Stamp:
        """The stamp of the iteration's file. Raises UserError if it leads out of the folder, OSError if absent."""
        stat = inside(self.path, self._file(iteration)).stat()
        return stat.st_mtime_ns, stat.st_size

    def table(self, trace: Trace) -> TokenTable:
        """The table of the trace's tokens, under the run's method and base temperature."""
        settings = self.settings
        base = settings.evaluation_temperature if trace.stage == "eval" else settings.training_temperature
        return token_table(trace, settings.method, base, self.tokenizer)

    def trace_of(self, entry: Entry) -> Trace:
        """The trace of an entry. Raises UserError if the file has lost it, as when a run resumes from a checkpoint."""
        traces, _ = self.traces(entry.iteration)
        if entry.place >= len(traces):
            raise UserError(f"{self._file(entry.iteration)} has been written anew: refresh the page")
        return traces[entry.place]

    def prompts(self) -> dict[str, list[Entry]]:
        """The run's entries by prompt, for the prompts that occur in several iterations."""
        found: dict[str, list[Entry]] = {}
        for iteration in self.iterations():
            for entry in self.entries(iteration)[0]:
                found.setdefault(f"{entry.stage}: {entry.prompt_id[:80]}", []).append(entry)
        return {name: entries for name, entries in found.items() if len({e.iteration for e in entries}) > 1}

    def metrics(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The lines of metrics.jsonl that have an iteration, and a sentence for every other line."""
        log = self.files.metrics
        with self.files.lock:
            try:
                log.look(inside(self.path, log.path))
            except (UserError, OSError) as error:
                return [], [f"{log.path} cannot be read: {error}"]
            return log.lines, log.problems

    @property
    def settings(self) -> RunSettings:
        """The settings in the run's recipe, or the defaults if there is no recipe."""
        recipe = self.recipe
        if recipe is None:
            return RunSettings()
        return RunSettings(recipe.method, recipe.rollout.temperature, recipe.evaluation.temperature)

    @property
    def recipe(self) -> Recipe | None:
        """The run's recipe; None if recipe.yaml is missing or of another version."""
        return self._recipe_and_problems[0]

    @property
    def recipe_problems(self) -> list[str]:
        """Sentences that say why there is no recipe; empty if there is one."""
        return self._recipe_and_problems[1]

    @property
    def activity(self) -> str:
        """A sentence that says what the run does now or did last; "" if it has no status."""
        try:
            status = read_status(inside(self.path, self.path / "status.json"))
        except (UserError, OSError):
            return ""
        return f"{self.path.name}: {status.stage}, iteration {status.iteration}." if status else ""

    @functools.cached_property
    def _recipe_and_problems(self) -> tuple[Recipe | None, list[str]]:
        try:
            return load_recipe(inside(self.path, self.path / "recipe.yaml")), []
        except (UserError, OSError) as error:
            return None, [f"{error} (HAPO's defaults are assumed)"]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The run's tokenizer; None if it is not on this machine. With it, the text of a token comes from its id."""
        recipe = self.recipe
        if recipe is None:
            return None
        name = loadable(recipe.model.name)
        try:
            return AutoTokenizer.from_pretrained(
                name, revision=recipe.model.revision, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError):
            return None

    def _file(self, iteration: int) -> Path:
        return trace_file(self.path / "traces", iteration)


def treated_together(entries: Sequence[Entry]) -> dict[str, Counter[str]]:
    """The treated tokens of several completions, counted together."""
    together: dict[str, Counter[str]] = {name: Counter() for name in TREATED}
    for entry in entries:
        for name, texts in entry.treated.items():
            together[name].update(texts)
    return together


def entry_of(trace: Trace, iteration: int, place: int) -> Entry:
    """The entry of a trace. place: its number in the file."""
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
        question=str(trace.messages[-1][1])[:LONGEST_QUESTION] if trace.messages else "",
        entropy=sum(trace.tokens["entropy"]) / len(texts),
        trained=any(trace.tokens.get("advantage", ())),
        reward=trace.reward,
        rewards=trace.rewards,
        group_size=trace.group_size,
        group_correct=trace.group_correct,
    )
