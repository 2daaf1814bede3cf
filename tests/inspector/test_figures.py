"""The inspector's colours, also for colour-blind readers, and its figures."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import pytest
import torch

from hapo_lite.algo.methods import Method
from hapo_lite.inspect import colour, figures, markup
from hapo_lite.inspect.tokens import QUANTITIES, DualWord, token_table, what_if
from tests.inspector.traces import ENTROPIES, make_trace, trained


def test_named_rewards_have_a_panel_of_their_own():
    lines = [{"iteration": i, "reward/mean": 0.5, "reward/correct_share": 0.5, "reward/<b>": 9} for i in (1, 2)]
    assert "rewards by name" not in dict(figures.curve_figures(lines))
    named = [line | {"reward/brief": -0.1, "reward/correct": 0.6} for line in lines]
    panel = dict(figures.curve_figures(named))["rewards by name"]
    assert [(curve["name"], curve["y"]) for curve in panel["data"]] == [("brief", [-0.1] * 2), ("correct", [0.6] * 2)]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["s", "d", "c"])
def test_text_stands_out_on_every_colour(kind, theme):
    for step in colour.palette(kind, theme):
        assert colour.contrast(colour.text_colour(step), step) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lightness_alone_orders_the_sequential_scale(theme):
    against_black = [colour.contrast("#000000", step) for step in colour.palette("s", theme)]
    assert against_black == sorted(against_black, reverse=theme == "light")


# What the three forms of dichromacy make of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
DICHROMACY = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("vision", DICHROMACY)
def test_both_sides_of_the_diverging_scale_differ_for_colour_blind_readers(vision, theme):
    scale = colour.palette("d", theme)
    rgb = torch.tensor([[int(step[i : i + 2], 16) / 255 for i in (1, 3, 5)] for step in scale])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(DICHROMACY[vision]).T).clamp(0, 1).pow(1 / 2.4)
    for step in range(3, 8):
        assert torch.dist(seen[7 - step], seen[7 + step]) > 0.25, step


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("vision", DICHROMACY)
def test_what_stops_a_gradient_has_colours_that_colour_blind_readers_tell(vision, theme):
    rgb = torch.tensor([[int(step[i : i + 2], 16) / 255 for i in (1, 3, 5)] for step in colour.palette("c", theme)[:4]])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ torch.tensor(DICHROMACY[vision]).T).clamp(0, 1).pow(1 / 2.4)
    assert torch.pdist(seen).min() > 0.15


def test_texts_that_share_a_scale_give_a_number_one_colour():
    tables = [token_table(make_trace()), token_table(make_trace(entropy=[v / 50 for v in ENTROPIES]))]
    span = markup.shared_spans(tables)["entropy"]
    assert span == pytest.approx((1e-6 / 50, 2.0))
    alone, together = (colour.colour_values([2.0, 0.04], QUANTITIES["entropy"], span=s).steps for s in (None, span))
    assert alone == [15, 0] and together[0] == 15 and together[1] > 8


def test_a_diverging_scale_has_its_centre_in_the_middle():
    scale = colour.colour_values([-0.2, 0.0, 1.0], QUANTITIES["h"])
    assert scale.steps[1] == 7 and scale.steps[2] == 14 and (scale.low, scale.high) == (-1.0, 1.0)
    assert set(colour.colour_values([1.0, 1.0], QUANTITIES["ratio"]).steps) == {7}


def test_figures_show_the_pivot_and_the_ratios():
    table = token_table(trained(make_trace(), Method(), 1.0, [1.0] * 6))
    pivot = figures.entropy_figure(table)["data"][1]
    assert pivot["y"][0] == pytest.approx(math.exp(table.signal.pivot))
    assert [series["name"] for series in figures.bounds_figure(table)["data"]] == ["lower", "upper", "ratio"]
    drawn = figures.what_if_figure(table, Method(), 1.5, 1.0)["data"][0]["y"]
    assert drawn == what_if(table, Method(), 1.5, 1.0).credit


def test_figures_are_what_plotly_takes():
    table = token_table(trained(make_trace(), Method(), 1.0, [1.0] * 6))
    lines = [{"iteration": i, "reward/mean": 0.1 * i, "entropy/correct_mean": 0.2} for i in range(3)]
    drawn = [
        figures.entropy_figure(table),
        figures.temperature_figure(table),
        figures.bounds_figure(table),
        figures.histogram_figure(table),
        figures.what_if_figure(table, Method(), 1.5, -1.0),
        figures.dual_entropy_figure([DualWord("so", [1e-4, 2.0])]),
        figures.side_by_side_figure(table, table, "entropy", "entropy, nats"),
        *(figure for _, figure in figures.curve_figures(lines, lines)),
    ]
    for figure in drawn:
        # Raises ValueError on a property that Plotly does not know, or a value that it does not take.
        assert go.Figure(data=figure["data"], layout=figure["layout"]).data
    for template in figures.templates().values():
        assert go.Figure().update_layout({key.replace(".", "_"): value for key, value in template.items()})
