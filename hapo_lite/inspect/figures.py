"""Tables -> plotly figures, and figures -> HTML that the page's script draws when it comes into view.

The script adds the light or the dark template, and buttons that save the picture and its numbers.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from hapo_lite.algo.methods import Method
from hapo_lite.inspect.markup import content_key, hidden_json
from hapo_lite.inspect.tokens import DualWord, TokenTable, show_number, what_if
from hapo_lite.report import PANELS

BLUE, ORANGE, GREY = "#2f7fb8", "#d9822b", "#8a8f98"
"""Tell apart under every common form of colour blindness, on light and on dark."""
MOST_MARKERS = 600
"""Tokens that are drawn one by one; of more, only the line can be made out."""
SERIES = (BLUE, ORANGE, "#7a68a6", "#3a9c8b", GREY)
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


def templates() -> dict[str, dict[str, Any]]:
    """The layout colours of the light and of the dark theme."""

    def one(text: str, grid: str, paper: str) -> dict[str, Any]:
        axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "color": text}
        return {
            "font.color": text,
            "paper_bgcolor": paper,
            "plot_bgcolor": "rgba(0,0,0,0)",
            **{f"{which}.{key}": value for which in ("xaxis", "yaxis") for key, value in axis.items()},
        }

    return {"light": one("#33373d", "#e3e2dc", "#fdfdfb"), "dark": one("#d5d7db", "#363a42", "#15171b")}


def figure_html(figure: go.Figure, name: str, reading: str) -> str:
    """A figure with its sentence. name: of the files that its PNG and CSV buttons save."""
    data = {"name": name, **figure.to_plotly_json()}
    height, hidden = figure.layout.height, hidden_json(data, "hapo-spec")
    return (
        f'<figure class="hapo-figure" data-key="{content_key(hidden)}"><figcaption>{html.escape(reading)}</figcaption>'
        f'<div class="hapo-plot" style="min-height:{height}px" role="img" aria-label="{html.escape(reading)}"></div>'
        f"{hidden}</figure>"
    )


def token_figures(table: TokenTable, method: Method) -> str:
    """Everything there is to draw about one generation, apart from the what-if."""
    rho = f"{100 * method.quantile:g} %"
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
            "Band of clipping bounds around ratio 1: deep where certain, high where uncertain (Eq. 12-13)."
            + (" Dots: actual ratios." if "ratio" in table.numbers else ""),
        ),
        figure_html(
            histogram_figure(table),
            "log_entropy",
            f"How log-entropy is spread. The line is the pivot, below which lie {rho} of the tokens it was fitted on "
            "(Eq. 5).",
        ),
    ]
    return "".join(parts)


def entropy_figure(table: TokenTable) -> go.Figure:
    """Entropy along the sequence, log axis, with the pivot line."""
    figure = _along(table, [max(v, table.signal.floor) for v in table.numbers["entropy"]], "entropy, nats")
    figure.update_yaxes(type="log", exponentformat="power")
    pivot = math.exp(table.signal.pivot)
    # A line on a log axis takes the logarithm for its annotation, so the pivot is a series of its own.
    figure.add_scatter(
        x=[0, max(len(table) - 1, 1)],
        y=[pivot, pivot],
        mode="lines",
        name=f"pivot {show_number(pivot)}",
        line={"color": ORANGE, "dash": "dash", "width": 1.5},
        hoverinfo="name",
    )
    return figure


def temperature_figure(table: TokenTable) -> go.Figure:
    """Temperature along the sequence, with its base."""
    figure = _along(table, table.numbers["temperature"], "temperature")
    figure.add_hline(table.base_temperature, line={"color": ORANGE, "dash": "dash", "width": 1.5})
    return figure


def bounds_figure(table: TokenTable) -> go.Figure:
    """The band between lower and upper bound, and the actual ratios where the trace has them."""
    x = list(range(len(table)))
    shared = {"x": x, "mode": "lines", "line": {"color": BLUE, "width": 1, "shape": "hvh"}, **_hover(table)}
    lower, upper = table.numbers["lower"], table.numbers["upper"]
    figure = go.Figure(layout=_layout("ratio"))
    figure.add_scatter(y=lower, name="lower", **shared)
    figure.add_scatter(
        y=upper,
        name="upper",
        fill="tonexty",
        fillcolor="rgba(47,127,184,.18)",
        **shared,
    )
    figure.add_hline(1.0, line={"color": GREY, "width": 1})
    if "ratio" in table.numbers:
        ratio = table.numbers["ratio"]
        figure.add_scatter(
            x=x,
            y=ratio,
            mode="markers",
            name="ratio",
            **_hover(table),
            marker={
                "color": [ORANGE if c else GREY for c in table.clipped],
                "symbol": ["x" if c else "circle" for c in table.clipped],
                "size": 6,
            },
        )
    return figure


def histogram_figure(table: TokenTable) -> go.Figure:
    """Log-entropy, with the pivot."""
    logs = [math.log(max(v, table.signal.floor)) for v in table.numbers["entropy"]]
    figure = go.Figure(layout=_layout("tokens", "log-entropy, log-nats"))
    figure.add_histogram(x=logs, nbinsx=40, marker={"color": BLUE}, name="tokens")
    figure.add_vline(table.signal.pivot, line={"color": ORANGE, "dash": "dash", "width": 1.5})
    return figure


def what_if_figure(table: TokenTable, method: Method, ratio: float, advantage: float) -> go.Figure:
    """Redistributed advantage of every token, were its ratio `ratio`; hollow bars are those that clipping stops."""
    outcome = what_if(table, method, ratio, advantage)
    stopped = [bool(c) for c in outcome.clipped]
    figure = go.Figure(layout=_layout("advantage"))
    figure.add_bar(
        x=list(range(len(table))),
        y=outcome.credit,
        name="advantage",
        hovertext=[
            f"{_label(table, i)}<br>advantage {show_number(c)}<br>bounds {show_number(low)} to {show_number(high)}"
            + (f"<br>clipped {clip}" if clip else "")
            for i, (c, low, high, clip) in enumerate(
                zip(outcome.credit, outcome.lower, outcome.upper, outcome.clipped, strict=True)
            )
        ],
        hoverinfo="text",
        marker={
            "color": ["rgba(0,0,0,0)" if s else BLUE for s in stopped],
            "line": {"color": [ORANGE if s else BLUE for s in stopped], "width": [1.5 if s else 0 for s in stopped]},
        },
    )
    figure.add_hline(advantage, line={"color": GREY, "dash": "dash", "width": 1})
    return figure


def dual_entropy_figure(words: Sequence[DualWord]) -> go.Figure:
    """Every occurrence of each word, by entropy, on a log axis."""
    figure = go.Figure(layout=_layout("", "entropy, nats"))
    for word in reversed(words):
        label = _plain(word.word, 24)
        figure.add_scatter(
            x=[max(e, 1e-8) for e in word.entropies],
            y=[label] * len(word.entropies),
            mode="lines+markers",
            line={"color": GREY, "width": 1},
            marker={"color": BLUE, "size": 7, "opacity": 0.65},
            hovertext=[f"{label}<br>{show_number(e)} nats" for e in word.entropies],
            hoverinfo="text",
        )
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_yaxes(type="category", automargin=True)
    figure.update_layout(height=120 + 22 * len(words))
    return figure


def curve_figures(lines: Sequence[dict[str, Any]]) -> list[tuple[str, go.Figure]]:
    """(heading, figure) for every panel of `report.PANELS` that metrics.jsonl has numbers for."""
    figures = []
    for heading, series in PANELS:
        figure = go.Figure(layout=_layout("", ""))
        for (key, label), colour in zip(series.items(), SERIES, strict=False):
            points = [(line["iteration"], line[key]) for line in lines if _number(line.get(key))]
            if points:
                x, y = zip(*points, strict=True)
                figure.add_scatter(
                    x=x, y=y, name=label, mode="lines+markers", line={"color": colour, "width": 1.6}, marker={"size": 4}
                )
        figure.update_layout(showlegend=True, height=280 + 16 * len(figure.data))
        if figure.data:
            figures.append((heading, figure))
    return figures


def _along(table: TokenTable, values: Sequence[float], title: str) -> go.Figure:
    figure = go.Figure(layout=_layout(title))
    figure.add_scatter(
        x=list(range(len(table))),
        y=list(values),
        mode="lines+markers" if len(table) <= MOST_MARKERS else "lines",
        name=title,
        **_hover(table),
        line={"color": BLUE, "width": 1},
        marker={"size": 5, "color": BLUE},
    )
    return figure


def _layout(y: str, x: str = "token") -> dict[str, Any]:
    return {
        "height": 280,
        "margin": {"l": 56, "r": 16, "t": 28, "b": 40},
        "font": {"family": FONT, "size": 12},
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
        "showlegend": False,
        "legend": {"orientation": "h", "y": -0.12, "yanchor": "top"},
        "template": None,
    }


def _hover(table: TokenTable) -> dict[str, Any]:
    """What a point tells: its token, and its value with four digits; plotly puts them together when it is asked."""
    text = [_plain(piece.shown, 40) for piece in table.pieces]
    return {"text": text, "hovertemplate": "%{x}: %{text}<br>%{y:.4~g}<extra></extra>"}


def _label(table: TokenTable, i: int) -> str:
    return f"{i}: {_plain(table.pieces[i].shown, 40)}"


def _plain(text: str, longest: int) -> str:
    """Text for a plotly label, which reads a subset of HTML."""
    return html.escape(text[:longest].replace("\n", ""), quote=False)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
