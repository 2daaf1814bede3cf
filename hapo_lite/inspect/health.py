"""How a run fares: its verdict, or that on it so far, and the warnings with the iterations at which they fell.

The verdict is that of `train.verdict`, and the warnings are those that the run itself prints or counts in its metrics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hapo_lite.errors import UserError, counted
from hapo_lite.inspect.figures import is_number
from hapo_lite.inspect.runs import Run
from hapo_lite.runs.files import inside
from hapo_lite.train.collapse import CollapseWatch
from hapo_lite.train.verdict import CUT_OFF, JUMPED, Verdict, judge_run, percent

Lines = Sequence[dict[str, Any]]
_VERDICT = TypeAdapter(Verdict)


@dataclass(frozen=True)
class Warned:
    """A warning and the iteration at which it fell."""

    iteration: int
    sentence: str


@dataclass(frozen=True)
class Health:
    """verdict: None if nothing can be said yet. final: whether the run has ended with it. warnings: by iteration."""

    verdict: Verdict | None
    final: bool
    warnings: list[Warned]


def health(run: Run, lines: Lines) -> Health:
    """The health of a run. lines: those of its metrics."""
    sound = [_sound(line) for line in lines]
    final = _final_verdict(run)
    return Health(final or _verdict_so_far(run, sound), final is not None, warnings(sound))


def warnings(lines: Lines) -> list[Warned]:
    """The warnings of a run, by iteration. lines: metrics that are finite numbers."""
    watch = CollapseWatch()
    found = []
    cut_before = 0.0
    for line in lines:
        number = int(line["iteration"])
        collapses = (sentence.partition(": ")[2] for sentence in watch.see(line))
        found += [Warned(number, sentence) for sentence in (*collapses, *_counted(line))]
        cut = line.get("length/truncated_share", 0.0)
        if cut >= CUT_OFF > cut_before:
            found.append(Warned(number, f"{percent(cut)} of the completions were cut off at the length limit"))
        cut_before = cut
    return found


def _counted(line: dict[str, Any]) -> Iterator[str]:
    """What one iteration's metrics count or measure as wrong."""
    skipped, shortages = int(line.get("update/skipped", 0)), int(line.get("memory/shortages", 0))
    if skipped:
        yield f"{counted(skipped, 'update')} skipped, since a number was nan or inf"
    if shortages:
        yield f"memory ran out {counted(shortages, 'time')}, and the batch was halved"
    if line.get("ratio/kl_old", 0.0) > JUMPED:
        yield f"the policy jumped {line['ratio/kl_old']:.2g} nats away from itself"


def _final_verdict(run: Run) -> Verdict | None:
    """The verdict in summary.json, which a run writes last; None if there is none."""
    try:
        text = inside(run.path, run.path / "summary.json").read_text("utf-8")
        return _VERDICT.validate_python(json.loads(text)["verdict"])
    except (UserError, OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def _verdict_so_far(run: Run, lines: Lines) -> Verdict | None:
    """The verdict on the iterations so far; None if the metrics are not those of a run."""
    if run.recipe is None or not any(line["iteration"] > 0 for line in lines):
        return None
    try:
        return judge_run(lines, run.recipe)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return None


def _sound(line: dict[str, Any]) -> dict[str, Any]:
    """The fields that are finite numbers, and the list that an evaluation writes if it holds such."""
    sound = {key: value for key, value in line.items() if is_number(value)}
    solved = line.get("eval/solved")
    if isinstance(solved, list) and all(map(is_number, solved)):
        sound["eval/solved"] = solved
    return sound
