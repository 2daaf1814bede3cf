"""The figures of a comparison, for light and for dark paper."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from numpy.typing import NDArray

from hapo_lite.compare.numbers import CURVES, MEASURES, Band, Numbers
from hapo_lite.compare.words import JUDGED
from hapo_lite.inspect.figures import templates

HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Colours that every common form of colour blindness keeps apart, on light and on dark (Okabe and Ito 2008)."""
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
FEW = 4
"""Most arms whose overlapping bands can be told apart; the bands of more arms are fainter."""
WIDTH, HEIGHT = 6.0, 4.2
"""Inches of one figure: its words can be read on a phone."""
DPI = 180


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, the same in every figure. The reference has the colour of the text.

    label: the name in the legend, None for a line without an entry. layer: lines of a higher layer lie above others.
    """

    colour: str
    dash: Any
    width: float = 1.8
    label: str | None = None
    layer: float = 2.0


@dataclass(frozen=True)
class Picture:
    """A figure of the report. name: the name of its file. reading: what it shows and how to read it.

    draw: takes the numbers and the theme.
    """

    name: str
    title: str
    reading: str
    draw: Callable[[Numbers, str], Figure]


@dataclass(frozen=True)
class DrawnPicture:
    """A picture as PNG, for light and for dark paper."""

    picture: Picture
    light: bytes
    dark: bytes


def styles(numbers: Numbers, theme: str) -> dict[str, Style]:
    """The style of each arm, the reference first. Where there are more arms than hues, the dashes change."""
    base = numbers.comparison.base
    others = [arm for arm in numbers.comparison.arms if arm != base]
    found = {a: Style(HUES[i % len(HUES)], DASHES[i // len(HUES) % len(DASHES)]) for i, a in enumerate(others)}
    return {base: Style(templates()[theme]["font.color"], "-", 2.6)} | found


def picture_bytes(figure: Figure) -> bytes:
    """A figure as PNG; the bytes are the same for the same numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def drawn(picture: Picture, numbers: Numbers) -> DrawnPicture:
    """A picture of these numbers."""
    light, dark = (picture_bytes(picture.draw(numbers, theme)) for theme in ("light", "dark"))
    return DrawnPicture(picture, light, dark)


def pictures(numbers: Numbers) -> list[Picture]:
    """The pictures of the report, in their order."""
    n, base = len(numbers.comparison.seeds), numbers.comparison.base
    band = f"mean over seeds (up to {n}), with the 95 % t interval of that mean as a band"
    bars = "Bar: 95 % t interval of the mean; filled where it excludes 0."
    if n == 1:
        band, bars = "one seed, which has no interval", "One seed has no interval."
    readings = {
        "accuracy": f"Held-out accuracy over completion tokens sampled in training: {band}. "
        "Higher, and sooner, is better.",
        "solved": f"Held-out problems that at least one of the evaluation's attempts solves: {band}. It falls where a "
        "policy becomes surer of what it can do, and rises where it solves others, or the same ones more often.",
        "entropy": f"Entropy of the policy over the tokens of an iteration: {band}. A fall to near 0 is collapse.",
        "length": f"Tokens per completion in training: {band}.",
        "clipped": f"Tokens at a clipping bound or the dual clip, which stops their gradient (cispo: caps it): {band}.",
    }
    curves = [
        Picture(key, title[0].upper() + title[1:], readings[key], partial(curve_figure, key))
        for key, title in CURVES.items()
    ]
    differences = Picture(
        "differences",
        f"Differences to {base}",
        f"Each arm less {base}, paired by seed. Small dots: one seed each. {bars} Right of 0 the arm did better.",
        difference_figure,
    )
    each = Picture(
        "arms",
        f"Each arm against {base}",
        f"How much higher the held-out accuracy of an arm is than that of {base} with the same seed, over the tokens: "
        "mean with its 95 % t interval, thin lines for the seeds. Above 0 the arm is ahead.",
        each_figure,
    )
    return [curves[0], differences, each, *curves[1:]]


def curve_figure(quantity: str, numbers: Numbers, theme: str) -> Figure:
    """The curves of all arms in one panel, with their bands, and the legend underneath."""
    with _theme(theme):
        columns = 3
        rows = math.ceil(len(numbers.arms) / columns)
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.22 * rows), layout="constrained")
        axes = figure.subplots()
        alpha = 0.15 if len(numbers.arms) <= FEW else 0.06
        for layer, (arm, style) in enumerate(styles(numbers, theme).items()):
            if arm in numbers.arms:
                # The reference is wide and lies under the others, so that none is hidden.
                style = replace(style, label=arm, layer=2.0 + layer)
                _draw_band(axes, numbers.grid, numbers.band(arm, quantity), style, alpha)
        _token_axis(axes, numbers)
        axes.set_ylabel(CURVES[quantity])
        if quantity != "accuracy":
            axes.set_ylim(bottom=0.0)
        if quantity == "clipped":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6)
    return figure


def each_figure(numbers: Numbers, theme: str) -> Figure:
    """A panel for every arm but the reference, with the arm's lead over the reference."""
    others = [arm for arm in numbers.others if len(numbers.curves(arm, "accuracy", less_reference=True))]
    columns = 1 if len(others) < 2 else 2
    rows = max(1, math.ceil(len(others) / columns))
    with _theme(theme):
        figure = Figure(figsize=(WIDTH, 0.5 + 2.0 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        look = styles(numbers, theme)
        for axes, arm in zip(grid.flat, others, strict=False):
            style = Style(look[arm].colour, "-")
            axes.axhline(0.0, color=look[numbers.comparison.base].colour, linewidth=1.0)
            _draw_band(axes, numbers.grid, numbers.band(arm, "accuracy", less_reference=True), style, alpha=0.2)
            for curve in numbers.curves(arm, "accuracy", less_reference=True):
                axes.plot(numbers.grid, curve, color=style.colour, linewidth=0.5, alpha=0.8)
            axes.set_title(arm, fontsize=10, loc="left")
            _token_axis(axes, numbers, label=False)
            axes.tick_params(length=0)
        for axes in list(grid.flat)[len(others) :]:
            axes.set_visible(False)
        figure.supxlabel("completion tokens sampled", fontsize=10)
        figure.supylabel(f"held-out accuracy less {numbers.comparison.base}'s", fontsize=10)
    return figure


def difference_figure(numbers: Numbers, theme: str) -> Figure:
    """What arms are judged by, less the reference's, with intervals and the seeds: a panel a measure."""
    base = numbers.comparison.base
    others = [arm for arm in numbers.others if numbers.difference(arm, "final") is not None]
    with _theme(theme):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * max(len(others), 1)), layout="constrained")
        panels = figure.subplots(1, len(JUDGED), sharey=True)
        look = styles(numbers, theme)
        paper = templates()[theme]["paper_bgcolor"]
        for axes, measure in zip(panels, JUDGED, strict=True):
            for row, arm in enumerate(others):
                interval = numbers.difference(arm, measure)
                if interval is None:
                    continue
                colour = look[arm].colour
                if interval.known:
                    axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.2)
                before, after = numbers.pairs(arm, measure)
                seeds = [b - a for a, b in zip(before, after, strict=True)]
                axes.plot(seeds, [row + 0.26] * len(seeds), ".", color=colour, alpha=0.7, markersize=4)
                fill = colour if interval.excludes_zero else paper
                axes.plot(interval.value, row, "o", color=colour, markerfacecolor=fill, markersize=7)
            axes.axvline(0.0, color=look[base].colour, linewidth=1.0)
            axes.set_title(MEASURES[measure].heading, fontsize=10, loc="left")
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.2g}" if abs(value) > 1e-9 else "0")
            axes.locator_params(axis="x", nbins=3)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(others)), others)
        panels[0].set_ylim(len(others) - 0.5, -0.6)
        figure.supxlabel(f"difference to {base}", fontsize=10)
    return figure


def _draw_band(axes: Axes, grid: NDArray[np.float64], band: Band, style: Style, alpha: float) -> None:
    """Draw a mean and the band around it. alpha: the opacity of the band."""
    axes.fill_between(grid, band.low, band.high, color=style.colour, alpha=alpha, linewidth=0)
    line = {"color": style.colour, "linestyle": style.dash, "linewidth": style.width, "zorder": style.layer}
    axes.plot(grid, band.mean, label=style.label, **line)


def _token_axis(axes: Axes, numbers: Numbers, label: bool = True) -> None:
    axes.set_xlim(0.0, numbers.grid[-1])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    if label:
        axes.set_xlabel("completion tokens sampled")


def _theme(theme: str) -> AbstractContextManager[None]:
    """A context with matplotlib's settings for light or dark paper."""
    colours = templates()[theme]
    text, line, paper = colours["font.color"], colours["xaxis.gridcolor"], colours["paper_bgcolor"]
    return matplotlib.rc_context(
        {
            "figure.facecolor": paper,
            "savefig.facecolor": paper,
            "axes.facecolor": paper,
            "axes.edgecolor": line,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": line,
            "grid.linewidth": 0.7,
            "text.color": text,
            "axes.labelcolor": text,
            "xtick.color": text,
            "ytick.color": text,
            "font.size": 10,
            "legend.fontsize": 10,
        }
    )
