"""Colour scales that colour-blind readers can tell apart, since lightness alone orders them in both themes.

A value becomes one of 16 steps of a sequential scale, or one of 15 steps of a diverging scale. Each step is a CSS
class, and the light and the dark theme give the class its colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plotly.colors import sample_colorscale

from hapo_lite.inspect.tokens import Quantity

STEPS = {"s": 16, "d": 15, "c": 6}
"""Number of steps of the sequential scale (s), of the diverging scale (d), and of categories (c)."""
CATEGORIES = {
    "light": ["#f6f5f1", "#56b4e9", "#e69f00", "#cc79a7", "#c9c7c0", "#ffffff"],
    "dark": ["#26282d", "#56b4e9", "#e69f00", "#cc79a7", "#5b5f66", "#15171b"],
}
"""Colours of categories. The first and the last two are no colours, since nothing happened there; the other ones are
those of Okabe and Ito (Color Universal Design, 2008), which differ for every common form of colour blindness."""
_SCALES = {
    ("s", "light"): ["#fbf9e7", "#e4eebf", "#a9d3b5", "#62adb9", "#3b7ca8", "#2f4b8c", "#1f2358"],
    ("s", "dark"): ["#1d2536", "#2b3a5c", "#4c566f", "#717379", "#9a9372", "#c9b861", "#ffe945"],
    ("d", "light"): ["#0b5c97", "#5a9fcb", "#b9d6e8", "#f6f5f1", "#f8cf9f", "#e78f3c", "#a95404"],
    ("d", "dark"): ["#8ccbf3", "#4592c2", "#285674", "#26282d", "#74481c", "#c97a2b", "#ffc078"],
}
INK = "#000000"
PAPER = "#ffffff"


def palette(kind: str, theme: str) -> list[str]:
    """The colours of a scale's steps as #rrggbb. kind: s, d or c. theme: light or dark."""
    if kind == "c":
        return CATEGORIES[theme]
    count = STEPS[kind]
    sampled = sample_colorscale(_SCALES[kind, theme], [i / (count - 1) for i in range(count)], colortype="tuple")
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in colour) for colour in sampled]


def text_colour(background: str) -> str:
    """INK or PAPER, whichever has more contrast with `background`."""
    return max((INK, PAPER), key=lambda colour: contrast(colour, background))


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two #rrggbb colours, 1 to 21."""
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@dataclass(frozen=True)
class Colouring:
    """One quantity's colours. kind: s, d or c. steps: [T]. low, high: the values at the ends of the scale."""

    kind: str
    steps: list[int]
    low: float
    high: float

    @property
    def classes(self) -> list[str]:
        """The CSS class of each token, [T]."""
        return [f"{self.kind}{step:x}" for step in self.steps]


def span_of(values: Sequence[float], quantity: Quantity, floor: float = 1e-8) -> tuple[float, float]:
    """The ends of a scale for these values: the smallest and the largest.

    A diverging scale reaches equally far to both sides of its centre. floor: on a log axis, a lower value counts as
    this one.
    """
    if quantity.names:
        return 0.0, len(quantity.names) - 1.0
    placed = [_place(v, quantity, floor) for v in values]
    low, high = min(placed, default=0.0), max(placed, default=0.0)
    if quantity.centre is not None:
        middle = _place(quantity.centre, quantity, floor)
        reach = max(high - middle, middle - low)
        low, high = middle - reach, middle + reach
    return (math.exp(low), math.exp(high)) if quantity.axis == "log" else (low, high)


def colour_values(
    values: Sequence[float], quantity: Quantity, floor: float = 1e-8, span: tuple[float, float] | None = None
) -> Colouring:
    """The step of each value. span: the ends of a scale that several texts share; None: the ends of `values`."""
    if quantity.names:
        return Colouring("c", [int(value) for value in values], *span_of(values, quantity))
    low, high = span or span_of(values, quantity, floor)
    start, end = _place(low, quantity, floor), _place(high, quantity, floor)
    kind = "s" if quantity.centre is None else "d"
    last = STEPS[kind] - 1
    # If all values are equal, a sequential scale shows its lowest step and a diverging scale its middle.
    resting = 0 if kind == "s" else last // 2
    scale = last / (end - start) if end - start > 1e-12 else 0.0
    steps = [round(scale * (_place(v, quantity, floor) - start)) if scale else resting for v in values]
    return Colouring(kind, [min(max(step, 0), last) for step in steps], low, high)


def _place(value: float, quantity: Quantity, floor: float) -> float:
    return math.log(max(value, floor)) if quantity.axis == "log" else value


def palette_css() -> str:
    """CSS rules for the classes `.s0`-`.sf` and `.d0`-`.de`. Those under `.dark` are for the dark theme."""
    rules = []
    for kind, theme in (*_SCALES, ("c", "light"), ("c", "dark")):
        scope = f"{'.dark ' if theme == 'dark' else ''}:is(.hapo-text, .hapo-legend)"
        for step, colour in enumerate(palette(kind, theme)):
            rules.append(f"{scope} .{kind}{step:x}{{background:{colour};color:{text_colour(colour)}}}")
    return "\n".join(rules)
