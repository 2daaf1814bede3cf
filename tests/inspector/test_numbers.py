"""The inspector's numbers are those of algo/, and what the update recorded."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from types import SimpleNamespace

import pytest
import torch

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, assign_credit, method_loss
from hapo_lite.algo.tokens import TokenSignals, fit_signal, trained_tokens
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tokens import (
    STOPS,
    csv_text,
    dual_entropy,
    percentiles,
    show_number,
    token_table,
    treated_tokens,
    what_if,
)
from hapo_lite.train.metrics import gap_metrics
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


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_stopped_a_gradient_is_named_where_the_loss_has_none(preset, advantage):
    method, entropy = PRESETS[preset], torch.tensor(ENTROPIES)
    signal = fit_signal(method, entropy)
    tokens = TokenSignals.of_one(method, signal, entropy)
    logp = torch.tensor([[0.5, 0.9, 12.0, 1.0, 1.7, 1.26]]).log().requires_grad_()
    inputs = LossInputs(torch.zeros(1, 6), torch.tensor([advantage]), tokens, torch.ones(1, 6), None, torch.zeros(1, 6))
    weightless = dataclasses.replace(method, kl_certain=0.0)  # The divergence from the base has a gradient of its own.
    loss, credit = method_loss(weightless, logp, inputs, 6.0)
    loss.loss.backward()
    low, high = loss.clipped_low[0].tolist(), loss.clipped_high[0].tolist()
    columns = {
        "advantage": [advantage] * 6,
        "credit": credit.advantage[0].tolist(),
        "clipped": ["low" if a else "high" if b else "" for a, b in zip(low, high, strict=True)],
    }
    trace = make_trace()
    trace = dataclasses.replace(trace, tokens=trace.tokens | columns, signal=signal)
    stops = [STOPS[int(code)] for code in token_table(trace, method).numbers["stopped"]]
    trained = trained_tokens(method, tokens.uncertain)[0].tolist()
    for i, (stop, gradient) in enumerate(zip(stops, logp.grad[0].tolist(), strict=True)):
        assert (stop == "none") == (abs(gradient) > 1e-9), (i, stop)
        assert (stop == "masked") == (not trained[i])
        if low[i] and trained[i]:
            assert stop == "lower bound"
        if high[i] and trained[i] and preset != "cispo":  # Its bound limits a weight, and the gradient stays.
            assert stop == ("upper bound" if advantage > 0 else "dual clip")
    if preset == "hapo" and advantage < 0:
        assert {"lower bound", "dual clip"} <= set(stops)


def test_tokens_that_were_not_drawn_are_masked():
    """As forking tokens leaves out certain ones. A completion without an advantage has no credit anyway."""
    method = PRESETS["random_tokens"]
    trace = make_trace()
    columns = {"advantage": [1.0] * 6, "credit": [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], "clipped": [""] * 6}
    table = token_table(dataclasses.replace(trace, tokens=trace.tokens | columns), method)
    stops = [STOPS[int(code)] for code in table.numbers["stopped"]]
    assert stops == ["none", "masked", "none", "masked", "masked", "none"]
    columns |= {"advantage": [0.0] * 6, "credit": [0.0] * 6}
    table = token_table(dataclasses.replace(trace, tokens=trace.tokens | columns), method)
    assert {STOPS[int(code)] for code in table.numbers["stopped"]} == {"no credit"}


def test_a_completion_that_is_left_out_is_masked():
    method = dataclasses.replace(Method(), truncated="mask")
    trace = dataclasses.replace(trained(make_trace(), method, 1.0, [1.0] * 6), truncated=True)
    assert set(token_table(trace, method).numbers["stopped"]) == {float(STOPS.index("masked"))}


def test_the_distance_of_sampler_and_trainer_is_that_of_the_metrics():
    trace = trained(make_trace(), Method(), 1.0, [1.0] * 6)
    trace.tokens["logp_old"] = [p + 0.01 * i for i, p in enumerate(trace.tokens["logp_base"])]
    numbers = token_table(trace).numbers
    columns = {name: torch.tensor(trace.tokens[name]) for name in ("logp_base", "logp_old")}
    sampled = SimpleNamespace(base_logp=columns["logp_base"])
    metrics = gap_metrics([sampled], [columns["logp_old"]])
    assert max(numbers["gap"]) == pytest.approx(metrics["sampler/gap_max"], abs=1e-6)
    assert sum(numbers["gap"]) / 6 == pytest.approx(metrics["sampler/gap_mean"], abs=1e-6)
    assert numbers["surprise"] == [-p - e for p, e in zip(trace.tokens["logp_old"], ENTROPIES, strict=True)]
    assert "gap" not in token_table(make_trace()).numbers


def test_credit_before_and_after_share_a_scale_and_a_category_is_named():
    page = html.unescape(markup.token_text(token_table(trained(make_trace(), Method(), 0.5, [1.0] * 6))))
    before, after = (
        re.search(rf'data-name="{name}" hidden>(.*?)</span>', page).group(1) for name in ("advantage", "credit")
    )
    assert before == after
    shown = json.loads(re.search(r'class="hapo-data">(.*?)</div>', page, re.DOTALL).group(1))
    assert shown["kinds"]["stopped"] == "c" and set(shown["rows"]["stopped"]) <= set(STOPS)
    for name in shown["rows"]:
        assert f'hapo-meaning" data-name="{name}"' in page


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
