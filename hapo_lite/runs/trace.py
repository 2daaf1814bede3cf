"""Traces: per-token records of a few completions, which a run writes and the inspector reads.

`traces/000010.jsonl` has one JSON object per completion, one on each line. Every list under "tokens" has one entry per
token.
"""

from __future__ import annotations

import array
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from pydantic_core import from_json

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError
from hapo_lite.runs.files import replace_text

VERSION = 1
ALWAYS = ("id", "text", "logp_sampling", "logp_base", "entropy", "temperature")
"""Lists that every trace has."""


@dataclass(frozen=True)
class Trace:
    """One completion. stage: "train" or "eval". signal: the iteration's; sampling_signal: it set the temperatures.

    rewards: its rewards by name, before their weights; empty in an evaluation and without `reward.functions`.
    group_size, group_correct: the completions of its group, recorded or not, and those of them that are correct; 0 and
    0 in files of older versions.

    tokens: lists by name. Every trace has id, text, logp_sampling, logp_base (the sampler's, at the base temperature),
    entropy (nats) and temperature. A training trace also has logp_old, logp_new, h, ratio, advantage (of the
    completion), credit (of the token), clipped ("", "low" or "high") and, for methods that have them, lower, upper,
    measure (what the bounds hold, if that is not the ratio) and kl_base. These are the values at the moment of the
    update that used the completion.
    """

    stage: str
    iteration: int
    prompt_id: str
    sample: int
    messages: list[tuple[str, str]]
    gold: str
    text: str
    reward: float
    outcome: str
    truncated: bool
    tokens: dict[str, list[Any]]
    signal: EntropySignal | None = None
    sampling_signal: EntropySignal | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    group_size: NonNegativeInt = 0
    group_correct: NonNegativeInt = 0
    version: int = VERSION


def trace_file(folder: Path, iteration: int) -> Path:
    """Where the traces of an iteration are. The file is absent for an iteration without traces."""
    return folder / f"{iteration:06d}.jsonl"


def write_traces(folder: Path, iteration: int, traces: Sequence[Trace]) -> None:
    """Write an iteration's file, or none without traces. After a crash the file is whole or absent. Raises OSError."""
    if not traces:
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(trace_file(folder, iteration), "".join(map(trace_line, traces)))


def trace_line(trace: Trace) -> str:
    """The line of a file that holds the trace."""
    return json.dumps(dataclasses.asdict(trace), ensure_ascii=False) + "\n"


def read_traces(path: Path) -> list[Trace]:
    """All traces of one file. Raises UserError naming the file and the first line that is no trace."""
    traces, problems = salvage_traces(path)
    if problems:
        raise UserError(problems[0])
    return traces


class Salvaged(NamedTuple):
    """The readable traces of a file, and a sentence for each line that could not be read."""

    traces: list[Trace]
    problems: list[str]


def salvage_traces(path: Path) -> Salvaged:
    """Every trace of a file that can be read. Raises nothing for a broken file."""
    found = Salvaged([], [])
    try:
        # The file is read as bytes, so that a line that is not UTF-8 is reported and the lines after it are still read.
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    found.traces.append(_parse(line, f"{path}:{number}"))
                except UserError as error:
                    found.problems.append(str(error))
    except OSError as error:
        found.problems.append(f"{path} cannot be read: {error}")
    return found


def drop_traces_after(folder: Path, iteration: int) -> None:
    """Remove the files of later iterations, which a resumed run writes again. Raises OSError."""
    for file in folder.glob("[0-9]*.jsonl"):
        if file.stem.isdigit() and int(file.stem) > iteration:
            file.unlink()


_FIELDS = TypeAdapter(Trace)


def _parse(line: bytes, where: str) -> Trace:
    """The trace on one line. Raises UserError that begins with `where`."""
    try:
        fields = from_json(line)
        if isinstance(fields, dict) and "version" in fields and fields["version"] != VERSION:
            raise UserError(f"{where}: trace version {str(fields['version'])[:40]}; this program reads {VERSION}")
        trace = _FIELDS.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "line"
        raise UserError(f"{where}: not a trace of hapo_lite ({place}: {first['msg']})") from None
    except ValueError as error:
        raise UserError(f"{where}: not a trace of hapo_lite ({error})") from None
    problem = _token_problem(trace.tokens)
    if not all(signal is None or _plausible(signal) for signal in (trace.signal, trace.sampling_signal)):
        problem = "its signal is out of range"
    if problem:
        raise UserError(f"{where}: not a trace of hapo_lite ({problem})")
    return trace


def _token_problem(tokens: dict[str, list[Any]]) -> str:
    """A clause that names the first problem with a completion's lists; "" without a problem."""
    if missing := [name for name in ALWAYS if not tokens.get(name)]:
        return f"its tokens have no {missing[0]}"
    if len({len(values) for values in tokens.values()}) > 1:
        return "its token lists differ in length"
    for name, values in tokens.items():
        if not _COLUMNS.get(name, _numbers)(values):
            return f"tokens.{name[:40]} holds something that does not belong there"
    return ""


def _numbers(values: list[Any]) -> bool:
    """Whether all values are numbers of a plausible size."""
    try:
        # An array accepts nothing but numbers, which takes a tenth of the time of checking each value's type.
        return bool((np.abs(np.frombuffer(array.array("d", values))) < 1e30).all())
    except (TypeError, OverflowError):
        return False


def _alternatives(values: list[Any]) -> bool:
    """Whether each value is a list of [text, number, number]."""
    return all(
        isinstance(row, list)
        and all(isinstance(a, list) and len(a) == 3 and isinstance(a[0], str) and _numbers(a[1:]) for a in row)
        for row in values
    )


_COLUMNS: dict[str, Callable[[list[Any]], bool]] = {
    "id": lambda values: all(type(v) is int and 0 <= v < 1 << 31 for v in values),
    "text": lambda values: all(isinstance(v, str) for v in values),
    "clipped": lambda values: all(v in ("", "low", "high") for v in values),
    "entropy": lambda values: _numbers(values) and min(values) >= 0.0,
    "alternatives": _alternatives,
}
"""Checks for the lists that do not hold arbitrary numbers."""


def _plausible(signal: EntropySignal) -> bool:
    """Whether the signal's numbers are in a plausible range."""
    reach = 0.0 <= signal.high < 1e3 and 0.0 <= signal.low < 1e3
    return -700.0 < signal.pivot < 100.0 and reach and 0.0 < signal.floor < 1.0
