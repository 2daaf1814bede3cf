"""The inspector's numbers are those of algo/, and what the update recorded."""

from __future__ import annotations

import html
import json
import re

import pytest
import torch

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import assign_credit
from hapo_lite.algo.tokens import TokenSignals, fit_signal
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tokens import (
    csv_text,
    dual_entropy,
    percentiles,
    show_number,
    token_table,
    treated_tokens,
    what_if,
)
from tests.inspector.traces import ENTROPIES, make_trace, trained


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_equal_algo(preset):
    method = PRESETS[preset]
    table = token_table(make_trace(), method)
    entropy = torch.tensor(ENTROPIES)
    tokens = TokenSignals.of_one(method, fit_signal(method, entropy), entropy)
    expected = assign_credit(method, torch.ones(1), tokens, torch.ones_like(tokens.h))
    assert table.numbers["h"] == tokens.h[0].tolist()
    assert table.numbers["lower"] == expected.lower[0].tolist()
    assert table.numbers["upper"] == expected.upper[0].tolist()
    assert table.numbers["weight"] == expected.advantage[0].tolist()
    page = html.unescape(markup.token_text(table))
    shown = json.loads(re.search(r'class="hapo-data">(.*?)</div>', page, re.DOTALL).group(1))["rows"]
    assert shown["upper"] == [show_number(v) for v in expected.upper[0].tolist()]


def test_what_the_update_recorded_is_shown_as_it_is():
    method, ratio = Method(), [1.0, 1.0, 0.5, 1.0, 1.3, 1.0]
    trace = trained(make_trace(), method, -0.5, ratio)
    table = token_table(trace, method)
    for name in ("h", "ratio", "credit", "lower", "upper", "advantage", "kl_base"):
        assert table.numbers[name] == trace.tokens[name]
    assert table.numbers["weight"] == [c / -0.5 for c in trace.tokens["credit"]]
    found = treated_tokens(trace)
    assert {name: len(positions) for name, positions in found.items()} == {
        "amplified": 1,
        "suppressed": 3,
        "clipped low": 1,
        "clipped high": 0,
    }


@pytest.mark.parametrize("ratio", [0.5, 0.85, 1.0, 1.2, 1.6, 12.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_what_if_is_the_equations(ratio, advantage):
    method, table = Method(), token_table(make_trace())
    outcome = what_if(table, method, ratio, advantage)
    tokens = TokenSignals.of_one(method, table.signal, table.tensor("entropy")[0])
    credit = assign_credit(method, torch.tensor([advantage]), tokens, torch.full_like(tokens.h, ratio))
    assert outcome.credit == credit.advantage[0].tolist()
    # Where the gradient of DAPO's surrogate is zero by hand: past the bound on the side it pushes to, or the dual clip.
    for clip, low, high in zip(outcome.clipped, outcome.lower, outcome.upper, strict=True):
        if advantage > 0:
            assert clip == ("high" if ratio > high else "")
        else:
            assert clip == ("low" if ratio < low else "high" if ratio > method.dual_clip else "")


def test_percentiles_count_ties():
    assert percentiles([3.0, 1.0, 3.0, 2.0]) == [100.0, 25.0, 100.0, 50.0]


def test_dual_entropy_needs_both_sides():
    table = token_table(make_trace(["so", "x", "so", "y", " so", "."], [2.0, 0.5, 1e-4, 1.0, 0.9, 0.8]))
    words = dual_entropy([table])
    assert [w.word for w in words] == ["so"]
    assert words[0].entropies == [1e-4, 0.9, 2.0]


def test_csv_has_every_number():
    table = token_table(make_trace(["=1+1", '"', "\n"]))
    lines = csv_text(table).splitlines()
    assert len(lines) == 4
    assert lines[0].split(",")[:4] == ["position", "text", "entropy", "h"]
    assert lines[1].startswith('0,"""=1+1""",1.2,')


def test_differences_are_marked():
    assert views.differing([1, 2, 3], [1, 2, 3]) == (set(), set())
    assert views.differing([1, 2, 3, 4], [1, 9, 3, 4, 5]) == ({1}, {1, 4})
