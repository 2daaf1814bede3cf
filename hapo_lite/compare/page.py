"""report.html: one file without a script or a request, for a phone and a laptop, in light and in dark.

Every text that a file may hold passes through `html.escape`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import hapo_lite
from hapo_lite.compare.figures import Picture
from hapo_lite.compare.numbers import MEASURES, Numbers
from hapo_lite.compare.plan import PlannedRun
from hapo_lite.compare.words import caveats, findings, shown, signed, verdict
from hapo_lite.runs.progress import in_words
from hapo_lite.train.intervals import Interval

COMPARED = ("final", "area", "to_threshold", "length", "entropy")
"""Measures in the table of differences; differences.csv has all."""
SIGNS = {"better": "▲", "worse": "▼", "more": "△", "less": "▽"}


def page(
    numbers: Numbers,
    runs: Sequence[PlannedRun],
    failed: dict[str, str],
    drawn: Sequence[tuple[Picture, bytes, bytes]],
) -> str:
    """The report. drawn: each picture with its PNG for light and for dark."""
    comparison = numbers.comparison
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    about = f"<p>{html.escape(comparison.about)}</p>" if comparison.about else ""
    seeds = len(comparison.seeds)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(comparison.name)}</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>{html.escape(comparison.name)}</h1>
<p class="soft">{len(comparison.arms)} arms × {seeds} seed{"s" if seeds > 1 else ""}, {comparison.tokens:,} completion
tokens each; reference: {html.escape(comparison.base)}</p>
{about}
{_missing(numbers, runs, failed)}
<ul>{"".join(f"<li>{html.escape(s)}</li>" for s in findings(numbers))}</ul>
<h2>At the end</h2>
{_final_table(numbers)}
<h2>Differences to {html.escape(comparison.base)}</h2>
{_difference_table(numbers)}
{"".join(f'<p class="soft">{html.escape(s)}</p>' for s in caveats(numbers))}
<h2>Curves</h2>
<div class="figures">{"".join(_figure(*each) for each in drawn)}</div>
<h2>Details</h2>
{_run_table(numbers)}
{_settings(numbers)}
<p class="soft">hapo_lite {html.escape(hapo_lite.__version__)}; training took {in_words(_seconds(numbers))} in all,
evaluations not counted. The numbers are in table.csv, differences.csv, runs.csv and curves.csv beside this file.</p>
</main>
</body>
</html>
"""


def _final_table(numbers: Numbers) -> str:
    rows = []
    for arm in numbers.arms:
        cells = [_head(arm), f"<td>{len(numbers.seeds(arm))}</td>"]
        for name, measure in MEASURES.items():
            unit = measure.unit
            # A run that did not come up to the threshold counts with all its tokens, so the mean is a lower bound.
            late = name == "to_threshold" and numbers.reached(arm) < len(numbers.seeds(arm))
            more = f"reached by {numbers.reached(arm)} of {len(numbers.seeds(arm))}" if late else ""
            cells.append(_interval_cell(numbers.mean(arm, name), unit, prefix="≥ " if late else "", more=more))
        rows.append("".join(cells))
    heads = ["arm", "seeds", *(m.heading for m in MEASURES.values())]
    meanings = "; ".join(f"{m.heading}: {m.meaning}" for m in MEASURES.values())
    return _table(
        heads,
        rows,
        f"Mean over seeds, below it the 95 % bootstrap interval of the mean. {meanings}. "
        f"Threshold: {numbers.threshold:.3f}.",
    )


def _difference_table(numbers: Numbers) -> str:
    rows = []
    for arm in numbers.others:
        cells = [_head(arm), f"<td>{len(numbers.pairs(arm, 'final')[0])}</td>"]
        for name in COMPARED:
            found = numbers.difference(arm, name)
            word = verdict(numbers, arm, name)
            mark = f'<b class="{word}">{SIGNS[word]} {word}</b>' if word else ""
            cells.append(
                "<td>-</td>" if found is None else _interval_cell(found, signed(MEASURES[name].unit), mark=mark)
            )
        rows.append("".join(cells))
    heads = ["arm", "pairs", *(MEASURES[name].heading for name in COMPARED)]
    return _table(
        heads,
        rows,
        f"Arm less {numbers.comparison.base}, paired by seed: mean, and its 95 % bootstrap interval. "
        "Marked where the interval excludes 0.",
    )


def _run_table(numbers: Numbers) -> str:
    rows = []
    for (arm, seed), run in sorted(numbers.runs.items(), key=lambda item: numbers.arms.index(item[0][0])):
        values = [shown(run.measures[name], measure.unit) for name, measure in MEASURES.items()]
        values[2] = values[2] if run.reach is not None else "not reached"
        cells = [str(seed), f"{run.sampled:,}", str(run.iterations), f"{run.before:.3f}", *values]
        rows.append(_head(arm) + "".join(f"<td>{cell}</td>" for cell in cells))
    heads = ["arm", "seed", "tokens", "iterations", "before", *(m.heading for m in MEASURES.values())]
    return f"<details><summary>Every run</summary>{_table(heads, rows, '')}</details>"


def _settings(numbers: Numbers) -> str:
    text = html.escape(numbers.comparison.to_yaml())
    return f"<details><summary>Settings: comparison.yaml</summary><pre>{text}</pre></details>"


def _missing(numbers: Numbers, runs: Sequence[PlannedRun], failed: dict[str, str]) -> str:
    """What the report lacks, first of all."""
    lacking = [run for run in runs if (run.arm, run.seed) not in numbers.runs]
    if not lacking:
        return ""
    lines = [f"{run.name} failed: {failed[run.name]}" if run.name in failed else run.name for run in lacking]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        f'<div class="warning" role="alert">{len(lacking)} of {len(runs)} runs are not complete and not in this '
        f"report; the same command goes on with them.<ul>{items}</ul></div>"
    )


def _figure(picture: Picture, light: bytes, dark: bytes) -> str:
    sources = [f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}" for png in (light, dark)]
    return (
        f'<figure id="{picture.name}"><figcaption><h3>{html.escape(picture.title)}</h3>{html.escape(picture.reading)}'
        f'</figcaption><picture><source media="(prefers-color-scheme: dark)" srcset="{sources[1]}">'
        f'<img src="{sources[0]}" alt="{html.escape(f"{picture.title}. {picture.reading}")}"></picture></figure>'
    )


def _table(heads: Sequence[str], rows: Sequence[str], caption: str) -> str:
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = f'<p class="soft">{html.escape(caption)}</p>' if caption else ""
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>{note}'


def _head(arm: str) -> str:
    return f'<th scope="row">{html.escape(arm)}</th>'


def _interval_cell(interval: Interval, unit: str, prefix: str = "", more: str = "", mark: str = "") -> str:
    if interval.value != interval.value:
        return "<td>-</td>"
    value = f"{prefix}{shown(interval.value, unit)}"
    small = f"{shown(interval.low, unit)} to {shown(interval.high, unit)}"
    lines = "".join(f"<small>{line}</small>" for line in (small, html.escape(more)) if line)
    return f"<td>{value} {mark}{lines}</td>"


def _seconds(numbers: Numbers) -> float:
    return sum(run.measures["seconds"] for run in numbers.runs.values())
