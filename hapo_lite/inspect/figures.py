"""Figures from tables, and the HTML of a figure, which the page's script draws when it comes into view.

A figure is a mapping of "data" and "layout" that Plotly draws. Plotly's own classes would check every value of every
series, which takes a second for a few thousand tokens, so a test checks the figures with these classes instead. The
script adds the light or the dark template, and buttons that save the picture and its numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from hapo_lite.algo.methods import Method
from hapo_lite.inspect.markup import content_key, hidden_json
from hapo_lite.inspect.tokens import QUANTITIES, DualWord, TokenTable, show_number, what_if
from hapo_lite.train.curves import PANELS, reward_panel

BLUE, ORANGE, GREY = "#2f7fb8", "#d9822b", "#8a8f98"
"""Colours that differ for every common form of colour blindness, in both themes."""
MOST_MARKERS = 600
"""A longer text is drawn as a line without a marker for each token."""
MOST_DOTS = 120
"""Iterations up to which a curve has a dot for each. Thousands of dots take a browser seconds to draw."""
MOST_POINTS = 400
"""Points that a curve has at most, however long the run."""
SERIES = (BLUE, ORANGE, "#7a68a6", "#3a9c8b", GREY)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
DASHED = {"color": ORANGE, "dash": "dash", "width": 1.5}

Figure = dict[str, Any]


def templates() -> dict[str, dict[str, Any]]:
    """The layout colours of the themes "light" and "dark"."""

    def colours(text: str, grid: str, paper: str) -> dict[str, Any]:
        axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "color": text}
        return {
            "font.color": text,
            "paper_bgcolor": paper,
            "plot_bgcolor": "rgba(0,0,0,0)",
            **{f"{which}.{key}": value for which in ("xaxis", "yaxis") for key, value in axis.items()},
        }

    return {"light": colours("#33373d", "#e3e2dc", "#fdfdfb"), "dark": colours("#d5d7db", "#363a42", "#15171b")}


def figure_html(figure: Figure, name: str, reading: str) -> str:
    """The HTML of a figure. name: that of the files that its buttons save. reading: the sentence that explains it."""
    height = figure["layout"]["height"]
    hidden = hidden_json({"name": name, **figure}, "hapo-spec")
    return (
        f'<figure class="hapo-figure" data-key="{content_key(hidden)}"><figcaption>{html.escape(reading)}</figcaption>'
        f'<div class="hapo-plot" style="min-height:{height}px" role="img" aria-label="{html.escape(reading)}"></div>'
        f"{hidden}</figure>"
    )


def token_figures(table: TokenTable, method: Method) -> str:
    """The HTML of all figures of one generation, except the what-if."""
    rho = f"{100 * method.quantile:g} %"
    ratios = " Dots: actual ratios; crosses: clipped." if "ratio" in table.numbers else ""
    if "measure" in table.numbers:
        ratios = f" Dots: what the bounds hold ({QUANTITIES['measure'].meaning}); crosses: clipped."
    parts = [
        figure_html(
            entropy_figure(table),
            "entropy",
            f"Entropy of every token, log axis. Tokens above the pivot, the {rho} quantile, have h > 0 (Eq. 5-6).",
        ),
        figure_html(
            temperature_figure(table),
            "temperature",
            "Sampling temperature of every token: hotter where h > 0, cooler where h < 0 (Eq. 8).",
        ),
        figure_html(
            bounds_figure(table),
            "bounds",
            f"Clipping bounds around ratio 1: lower for certain tokens, higher for uncertain ones (Eq. 12-13).{ratios}",
        ),
        figure_html(
            histogram_figure(table),
            "log_entropy",
            f"Distribution of log-entropy. The line is the pivot: {rho} of the tokens that it was fitted on lie below "
            "(Eq. 5).",
        ),
    ]
    return "".join(parts)


def entropy_figure(table: TokenTable) -> Figure:
    """Entropy of each token on a log axis, with the pivot as a line."""
    values = [max(v, table.signal.floor) for v in table.numbers["entropy"]]
    return framed("entropy, nats", [_along(table, values, "entropy"), _pivot(table)], yaxis=_log_axis(values))


def temperature_figure(table: TokenTable) -> Figure:
    """Temperature of each token, with the base temperature as a line."""
    series = _along(table, table.numbers["temperature"], "temperature")
    return framed("temperature", [series], shapes=[_level(table.base_temperature, DASHED)])


def bounds_figure(table: TokenTable) -> Figure:
    """The band between the lower and the upper bound, and what they hold if the trace has it: ratios, mostly."""
    line = {"mode": "lines", "line": {"color": BLUE, "width": 1, "shape": "hvh"}}
    lower = _series(table, table.numbers["lower"], "lower", **line)
    upper = _series(table, table.numbers["upper"], "upper", **line, fill="tonexty", fillcolor="rgba(47,127,184,.18)")
    data = [lower, upper] if all(map(math.isfinite, table.numbers["upper"])) else []
    held = "measure" if "measure" in table.numbers else "ratio"
    if held in table.numbers:
        marker = {
            "color": [ORANGE if c else GREY for c in table.clipped],
            "symbol": ["x" if c else "circle" for c in table.clipped],
            "size": 6,
        }
        data.append(_series(table, table.numbers[held], held, mode="markers", marker=marker))
    return framed(held, data, shapes=[_level(1.0, {"color": GREY, "width": 1})])


def histogram_figure(table: TokenTable) -> Figure:
    """A histogram of log-entropy, with the pivot as a line."""
    logs = [math.log(max(v, table.signal.floor)) for v in table.numbers["entropy"]]
    bars = {"type": "histogram", "x": logs, "nbinsx": 40, "marker": {"color": BLUE}, "name": "log-entropy"}
    pivot = {"type": "line", "x0": table.signal.pivot, "x1": table.signal.pivot, "y0": 0, "y1": 1, "yref": "paper"}
    return framed("tokens", [bars], "log-entropy, log-nats", shapes=[{**pivot, "line": DASHED}])


def what_if_figure(table: TokenTable, method: Method, ratio: float, advantage: float) -> Figure:
    """The redistributed advantage of every token if its ratio were `ratio`.

    A hollow bar is a token whose gradient clipping stops.
    """
    outcome = what_if(table, method, ratio, advantage)
    stopped = [bool(c) for c in outcome.clipped]
    bars = {
        "type": "bar",
        "x": list(range(len(table))),
        "y": outcome.credit,
        "name": "advantage",
        "hovertext": [
            f"{i}: {_plain(table.pieces[i].shown, 40)}<br>advantage {show_number(c)}<br>bounds {show_number(low)} to "
            f"{show_number(high)}" + (f"<br>clipped {clip}" if clip else "")
            for i, (c, low, high, clip) in enumerate(
                zip(outcome.credit, outcome.lower, outcome.upper, outcome.clipped, strict=True)
            )
        ],
        "hoverinfo": "text",
        "marker": {
            "color": ["rgba(0,0,0,0)" if s else BLUE for s in stopped],
            "line": {"color": [ORANGE if s else BLUE for s in stopped], "width": [1.5 if s else 0 for s in stopped]},
        },
    }
    return framed("advantage", [bars], shapes=[_level(advantage, {"color": GREY, "dash": "dash", "width": 1})])


def dual_entropy_figure(words: Sequence[DualWord]) -> Figure:
    """A row for each word, with the entropy of every occurrence on a log axis."""
    data: list[dict[str, Any]] = []
    for word in reversed(words):
        label = _plain(word.word, 24)
        data.append(
            {
                "type": "scatter",
                "name": label,
                "x": [max(e, 1e-8) for e in word.entropies],
                "y": [label] * len(word.entropies),
                "mode": "lines+markers",
                "line": {"color": GREY, "width": 1},
                "marker": {"color": BLUE, "size": 7, "opacity": 0.65},
                "hovertemplate": "%{y}<br>%{x:.4~g} nats<extra></extra>",
            }
        )
    xaxis = _log_axis([e for series in data for e in series["x"]])
    yaxis = {"type": "category", "automargin": True}
    return framed("", data, "entropy, nats", 120 + 22 * len(words), xaxis=xaxis, yaxis=yaxis)


def side_by_side_figure(left: TokenTable, right: TokenTable, quantity: str, title: str) -> Figure:
    """One quantity of two generations along their tokens. Entropy has a log axis."""
    log = QUANTITIES[quantity].axis == "log"
    data = []
    for table, name, colour in ((left, "left", BLUE), (right, "right", ORANGE)):
        values = [max(v, table.signal.floor) if log else v for v in table.numbers[quantity]]
        data.append(_along(table, values, name, colour))
    yaxis = _log_axis([v for series in data for v in series["y"]]) if log else {}
    legend = {"orientation": "h", "y": 1, "yanchor": "bottom"}
    return framed(title, data, yaxis=yaxis, showlegend=True, legend=legend) | {"tokens": False}


def curve_figures(lines: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]] = ()) -> list[tuple[str, Figure]]:
    """(heading, figure) for every panel of `train.curves.PANELS` that has numbers, and for rewards by name.

    lines: the lines of metrics.jsonl. other: those of a second run, which is drawn dashed.
    """
    figures = []
    for heading, panel in [*PANELS, ("rewards by name", reward_panel([*lines, *other]))]:
        curves = []
        for (key, label), colour in zip(panel.items(), SERIES, strict=False):
            solid = {"color": colour, "width": 1.6, "dash": "solid"}
            curves.append(metric_curve(lines, key, f"{label}, left" if other else label, solid))
            curves.append(metric_curve(other, key, f"{label}, right", {**solid, "dash": "dash"}))
        drawn = [curve for curve in curves if curve["x"]]
        if drawn:
            figures.append((heading, framed("", drawn, "", 230 + 16 * len(drawn), showlegend=True)))
    return figures


def metric_curve(lines: Sequence[dict[str, Any]], key: str, name: str, look: dict[str, Any]) -> dict[str, Any]:
    """One metric by iteration, from the lines that have a number for it.

    A curve of more than MOST_POINTS is drawn by its extremes, so that no spike is lost.
    """
    measured = [(line["iteration"], line[key]) for line in lines if is_number(line.get(key))]
    drawn = extremes(measured, MOST_POINTS)
    return {
        "type": "scatter",
        "x": [iteration for iteration, _ in drawn],
        "y": [value for _, value in drawn],
        "name": name,
        "mode": "lines+markers" if len(drawn) <= MOST_DOTS else "lines",
        "line": look,
        "marker": {"size": 4},
    }


def extremes(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` (x, y) points: all of them, or the lowest and the highest of each of equally long stretches.

    The last point is one of them. most: an even number.
    """
    if len(points) <= most:
        return list(points)
    step = math.ceil(len(points) / (most // 2 - 1))
    kept: set[int] = {len(points) - 1}
    for start in range(0, len(points), step):
        stretch = range(start, min(start + step, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def framed(y: str, data: list[dict[str, Any]], x: str = "token", height: int = 230, **layout: Any) -> Figure:
    axes = {name: {"title": {"text": title}, **layout.pop(name, {})} for name, title in (("xaxis", x), ("yaxis", y))}
    return {
        # A click on a point of such a figure shows the token at its x in the text above.
        "tokens": x == "token",
        "data": data,
        "layout": {
            "height": height,
            "margin": {"l": 56, "r": 16, "t": 28, "b": 40},
            "font": {"family": FONT, "size": 12},
            "showlegend": False,
            "legend": {"orientation": "h", "y": -0.12, "yanchor": "top"},
            **axes,
            **layout,
        },
    }


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A log axis. If the values span more than two decades, it labels whole decades, about seven at most."""
    decades = math.log10(max(values) / min(values))
    ticks = {"dtick": math.ceil(decades / 7)} if decades > 2 else {"nticks": 6}
    return {"type": "log", "exponentformat": "power", **ticks}


def _series(table: TokenTable, values: Sequence[float], name: str, **look: Any) -> dict[str, Any]:
    """A series of one value per token. The label of a point shows its token, and its value with four digits."""
    return {
        "type": "scatter",
        "x": list(range(len(table))),
        "y": [value if math.isfinite(value) else None for value in values],
        "name": name,
        "text": [_plain(piece.shown, 40) for piece in table.pieces],
        "hovertemplate": "%{x}: %{text}<br>%{y:.4~g}<extra></extra>",
        **look,
    }


def _along(table: TokenTable, values: Sequence[float], name: str, colour: str = BLUE) -> dict[str, Any]:
    return _series(
        table,
        values,
        name,
        mode="lines+markers" if len(table) <= MOST_MARKERS else "lines",
        line={"color": colour, "width": 1},
        marker={"size": 5, "color": colour},
    )


def _pivot(table: TokenTable) -> dict[str, Any]:
    pivot = math.exp(table.signal.pivot)
    return {
        "type": "scatter",
        "x": [0, max(len(table) - 1, 1)],
        "y": [pivot, pivot],
        "mode": "lines",
        "name": f"pivot {show_number(pivot)}",
        "line": DASHED,
        "hoverinfo": "name",
    }


def _level(y: float, line: dict[str, Any]) -> dict[str, Any]:
    """A horizontal line across the figure, without a label."""
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _plain(text: str, longest: int) -> str:
    """Text for a Plotly label, escaped because Plotly reads some HTML there."""
    return html.escape(text[:longest].replace("\n", ""), quote=False)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
