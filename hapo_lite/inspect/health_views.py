"""The health of a run as HTML: the verdict on top, the warnings where they fell, and the time of each stage."""

from __future__ import annotations

import bisect
import html
import math
from collections.abc import Sequence
from typing import Any

from hapo_lite.errors import counted
from hapo_lite.inspect import figures, markup
from hapo_lite.inspect.figures import BLUE, ORANGE, SERIES, Figure
from hapo_lite.inspect.health import Health, Lines, Warned
from hapo_lite.inspect.places import Place

REWARDS = {"reward/mean": "reward", "eval/accuracy": "held out"}
STAGES = ("rollout", "grade", "score", "update", "evaluate")
MOST_BARS = 120
"""Bars that the figure of the stages has at most."""
HEIGHT = 170
"""Height of a figure of the grid, pixels."""
MOST_WARNINGS = 6
"""Warnings that are listed. The figure marks them all."""
LONG = 300
"""Seconds beyond which a time is given in minutes."""
LATE = 10
"""Iterations over which a rate is averaged."""


def health_html(name: str, state: Health, lines: Lines, activity: str) -> str:
    """The verdict, the facts and the warnings. name: of the run. activity: a sentence that says what it does."""
    parts = [_verdict(state)]
    parts.append(f"<div>{markup.chips(_facts(lines))}<span>{html.escape(activity)}</span></div>")
    items = [
        f'<li><a href="{html.escape(Place(name, warned.iteration).address)}">iteration {warned.iteration}</a> '
        f"{html.escape(warned.sentence)}</li>"
        for warned in state.warnings[-MOST_WARNINGS:]
    ]
    if items:
        more = len(state.warnings) - len(items)
        before = f"<li>{counted(more, 'earlier warning')}, marked in the figure of the stages</li>" if more else ""
        parts.append(f'<ul class="hapo-warnings" aria-label="Warnings">{before}{"".join(items)}</ul>')
    inner = "".join(parts)
    return f'<section class="hapo-health" data-key="{markup.content_key(inner)}">{inner}</section>'


def _verdict(state: Health) -> str:
    """The verdict, its word in bold, with what is worth mending below it."""
    if state.verdict is None:
        return '<p class="hapo-verdict">No verdict yet: it needs an evaluation before training and one after.</p>'
    word, sentence = state.verdict.word, state.verdict.sentence
    rest = sentence.removeprefix(word)
    bold = f"<b>{html.escape(word)}</b>{html.escape(rest)}" if rest != sentence else html.escape(sentence)
    so_far = "" if state.final else "So far: "
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in state.verdict.because)
    below = f'<ul class="hapo-because">{reasons}</ul>' if reasons else ""
    return f'<p class="hapo-verdict">{so_far}{bold}</p>{below}'


def _facts(lines: Lines) -> list[str]:
    """Short facts from the metrics, each left out if the metrics lack it."""
    trained = [line for line in lines if line["iteration"] > 0]
    if not trained:
        return []
    last = trained[-1]
    facts = [f"iteration {int(last['iteration'])}"]
    if _has(last, "tokens"):
        facts.append(f"{int(last['tokens']):,} tokens sampled")
    rates = [line["tokens_per_second/sampled"] for line in trained[-LATE:] if _has(line, "tokens_per_second/sampled")]
    if rates:
        facts.append(f"{sum(rates) / len(rates):,.0f} tokens/s of late")
    seconds = [line["seconds/iteration"] for line in trained if _has(line, "seconds/iteration")]
    if seconds:
        whole = sum(seconds)
        facts.append(f"{whole / 60:,.0f} minutes of training" if whole > LONG else f"{whole:.0f} s of training")
    memory = [line["memory/peak_mb"] for line in trained if _has(line, "memory/peak_mb")]
    if memory:
        facts.append(f"{max(memory):,.0f} MiB at most")
    return facts


def _has(line: dict[str, Any], key: str) -> bool:
    return figures.is_number(line.get(key))


def health_figures(lines: Lines, warned: Sequence[Warned]) -> str:
    """The figures of a run in a grid: reward, seconds by stage with the warnings, tokens per second, and memory."""
    drawn = [
        ("reward", "Reward and held-out accuracy", _curves(lines, REWARDS)),
        ("stages", "Seconds of each stage; ▲ warnings", stages_figure(lines, warned)),
        ("tokens_per_second", "Tokens sampled per second", _curves(lines, {"tokens_per_second/sampled": "tokens/s"})),
        ("memory", "Peak memory so far, MiB", _curves(lines, {"memory/peak_mb": "MiB"})),
    ]
    parts = [figures.figure_html(figure, name, reading) for name, reading, figure in drawn if figure["data"]]
    return f'<div class="hapo-figures hapo-four">{"".join(parts)}</div>' if parts else ""


def stages_figure(lines: Lines, warned: Sequence[Warned]) -> Figure:
    """Seconds of each stage by iteration, one above the other, with a sign where a warning fell.

    A bar of a long run stands for several iterations, with their mean, so that no run has more than MOST_BARS. A bar
    has one sign at most.
    """
    step = max(1, math.ceil(len(lines) / MOST_BARS))
    parts = [lines[start : start + step] for start in range(0, len(lines), step)]
    starts = [int(part[0]["iteration"]) for part in parts]
    data: list[dict[str, Any]] = []
    tops = [0.0] * len(parts)
    for stage, colour in zip(STAGES, SERIES, strict=True):
        key = f"seconds/{stage}"
        if not any(_has(line, key) for line in lines):
            continue
        means = [sum(line[key] for line in part if _has(line, key)) / len(part) for part in parts]
        tops = [top + mean for top, mean in zip(tops, means, strict=True)]
        bars = {"type": "bar", "x": starts, "y": means, "name": stage, "marker": {"color": colour}, "width": 0.9 * step}
        data.append(bars | {"offset": 0, "hovertemplate": "iteration %{x}<br>%{y:.3~g} s<extra>" + stage + "</extra>"})
    if data and warned:
        data.append(_signs(warned, starts, 1.05 * max(tops)))
    return _small(data, barmode="stack", showlegend=True)


def _signs(warned: Sequence[Warned], starts: Sequence[int], height: float) -> dict[str, Any]:
    """A sign for each bar with a warning, at its first one. starts: the first iterations of the bars."""
    found: dict[int, list[Warned]] = {}
    for one in warned:
        found.setdefault(bisect.bisect_right(starts, one.iteration), []).append(one)
    firsts = [ones[0] for ones in found.values()]
    more = [f", and {counted(len(ones) - 1, 'more warning')}" if len(ones) > 1 else "" for ones in found.values()]
    sentences = [f"iteration {one.iteration}: {html.escape(one.sentence[:100], quote=False)}" for one in firsts]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "warning",
        "x": [one.iteration for one in firsts],
        "y": [height] * len(firsts),
        "text": [sentence + rest for sentence, rest in zip(sentences, more, strict=True)],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": "#b3261e", "symbol": "triangle-up", "size": 10},
    }


def _curves(lines: Lines, named: dict[str, str]) -> Figure:
    """Some metrics by iteration. named: the label of each metric."""
    looks = [{"color": BLUE, "width": 1.6, "dash": "solid"}, {"color": ORANGE, "width": 2, "dash": "dot"}]
    curves = [
        figures.metric_curve(lines, key, label, look) for (key, label), look in zip(named.items(), looks, strict=False)
    ]
    return _small([curve for curve in curves if curve["x"]], showlegend=len(named) > 1)


def _small(data: list[dict[str, Any]], **layout: Any) -> Figure:
    margin = {"l": 40, "r": 8, "t": 26, "b": 24}
    legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "font": {"size": 10}}
    return figures.framed("", data, "", HEIGHT, margin=margin, legend=legend, **layout)
