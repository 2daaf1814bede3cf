"""The inspector's pure functions: escaping, characters in pieces, numbers equal to algo's, runs that are broken."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from transformers import AutoTokenizer

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import assign_credit
from hapo_lite.algo.tokens import TokenSignals, fit_signal
from hapo_lite.errors import UserError
from hapo_lite.inspect import colour, figures, markup, views
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.inspect.runs import open_run, run_names
from hapo_lite.inspect.tokens import (
    QUANTITIES,
    DualWord,
    csv_text,
    dual_entropy,
    percentiles,
    show_number,
    token_pieces,
    token_table,
    treated_tokens,
    visible,
    what_if,
)
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.runs.trace import Trace, read_traces, write_traces

ENTROPIES = [1.2, 0.3, 1e-4, 0.02, 2.0, 1e-6]
HOSTILE = ["<script>alert(1)</script>", "</script>", '" onmouseover="alert(1)', "'`${1}`{{x}}", "</div><b>", "&lt;"]


def make_trace(texts=("a", " b", "c", "d", " a", "."), entropy=ENTROPIES, **fields) -> Trace:
    count = len(texts)
    tokens = {
        "id": list(range(count)),
        "text": list(texts),
        "logp_sampling": [-0.5] * count,
        "logp_base": [-0.25 * (i + 1) for i in range(count)],
        "entropy": list(entropy)[:count],
        "temperature": [1.0] * count,
    }
    plain = {"stage": "eval", "iteration": 3, "prompt_id": "p", "sample": 0, "messages": [["user", "why?"]]}
    plain |= {"gold": "1", "text": "".join(texts), "reward": 0.0, "outcome": "wrong", "truncated": False}
    return Trace(**{**plain, "tokens": tokens, **fields})


def trained(trace: Trace, method: Method, advantage: float, ratio: list[float]) -> Trace:
    """The trace with what an update would have recorded."""
    entropy = torch.tensor(trace.tokens["entropy"])
    signal = fit_signal(method, entropy)
    tokens = TokenSignals.of_one(method, signal, entropy)
    credit = assign_credit(method, torch.tensor([advantage]), tokens, torch.tensor([ratio]))
    update = {
        "logp_old": trace.tokens["logp_base"],
        "h": tokens.h[0].tolist(),
        "ratio": ratio,
        "advantage": [advantage] * len(ratio),
        "credit": credit.advantage[0].tolist(),
        "lower": credit.lower[0].tolist(),
        "upper": credit.upper[0].tolist(),
        "clipped": ["low" if r < 0.7 else "" for r in ratio],
        "kl_base": [0.25 * i for i in range(len(ratio))],
    }
    return dataclasses.replace(trace, stage="train", tokens=trace.tokens | update, signal=signal)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


# --- text -------------------------------------------------------------------------------------------------------------


def strip_known(page: str) -> str:
    """The page without the tags that the inspector itself writes."""
    known = "section|div|span|label|select|option|button|aside|p|i|wbr|figure|figcaption|article|header|b"
    known += "|table|thead|tbody|tr|th|td"
    return re.sub(rf"</?(?:{known})(?: [a-z-]+(?:=\"[^\"]*\")?)*>", "", page)


def test_hostile_text_is_text_everywhere():
    alternatives = [[[text, 0.5, 0.4] for text in HOSTILE] for _ in HOSTILE]
    trace = make_trace(HOSTILE, messages=[["<i>", "<script>"]], gold="<gold>", outcome="<b>")
    trace.tokens["alternatives"] = alternatives
    table = token_table(trace)
    parts = views.generation(trace, table, Method())
    pages = [*dataclasses.astuple(parts), views.what_if(table, Method(), 1.5, True), markup.small_text(table)]
    pages += [markup.token_text(table, streaming=True), markup.cards([("<script>", "<b>", "")], "list")]
    pages += [markup.plain_table(["<b>"], [["<script>"]], "<i>", "table")]
    for page in pages:
        left = strip_known(page)
        assert "<" not in left and ">" not in left.replace("->", ""), left[:300]
    for text in HOSTILE:
        assert html.escape(visible(text)) in parts.tokens


def test_the_hidden_json_reads_back():
    page = markup.hidden_json({"a": HOSTILE}, "x")
    inner = re.fullmatch(r'<div hidden class="x">(.*)</div>', page, re.DOTALL).group(1)
    assert json.loads(html.unescape(inner)) == {"a": HOSTILE}


def test_a_huge_token_is_cut_on_the_page_and_whole_in_the_csv():
    huge = "x" * 1_000_000
    table = token_table(make_trace([huge]))
    assert "(1,000,000 characters)" in markup.token_text(table)
    assert len(markup.token_text(table)) < 20_000
    assert huge in csv_text(table)


def test_whitespace_controls_and_direction_marks_are_visible():
    assert visible(" a\n\t") == "·a↵\n⇥"
    assert visible("\x00\u202e\u200b\r") == "⟨U+0000⟩⟨U+202E⟩⟨U+200B⟩⟨U+000D⟩"
    assert visible("\u00a0\u3000") == "⟨U+00A0⟩⟨U+3000⟩"
    assert visible("") == "∅"
    assert visible("שלום 漢字") == "שלום·漢字"


def test_characters_cut_into_tokens_are_put_together(tokenizer):
    text = "a漢🙂é\n"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = token_pieces(ids, [tokenizer.decode([i]) for i in ids], tokenizer)
    assert "".join(p.raw for p in pieces) == text
    assert [p.part for p in pieces][1:4] == ["1/3", "2/3 of 漢", "3/3 of 漢"]
    assert len(pieces) == len(ids)


def test_bytes_that_never_become_a_character_stay_single(tokenizer):
    ids = tokenizer.encode("漢")[:2] + tokenizer.encode("a")
    pieces = token_pieces(ids, ["", "", ""], tokenizer)
    assert [p.raw for p in pieces] == ["\ufffd", "\ufffd", "a"]


def test_special_tokens_are_marked(tokenizer):
    [piece] = token_pieces(tokenizer.encode("<|im_end|>"), ["<|im_end|>"], tokenizer)
    assert piece.special and piece.shown == "<|im_end|>"
    assert token_pieces([2], ["<|im_end|>"])[0].special


# --- numbers ----------------------------------------------------------------------------------------------------------


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


# --- colours and figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["s", "d"])
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


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path) -> Path:
    root = tmp_path / "runs"
    for iteration in (0, 1, 2):
        traces = [trained(make_trace(iteration=iteration), Method(), 0.5, [1.0, 0.6, 1.0, 1.2, 1.0, 1.0])]
        write_traces(root / "one" / "traces", iteration, [make_trace(iteration=iteration, outcome="correct"), *traces])
    (root / "one" / "metrics.jsonl").write_text('{"iteration": 0, "reward/mean": 0.5}\nnonsense\n{"x": 1}\n', "utf-8")
    (root / "empty").mkdir()
    return root


def test_a_run_without_a_recipe_says_what_is_assumed(run_folder):
    [problem] = open_run(run_folder, "one").recipe_problems
    assert "recipe.yaml" in problem and "assumed" in problem


def test_which_tokens_were_treated_is_named(run_folder):
    page = html.unescape(views.treated(open_run(run_folder, "one").entries(1)[0]))
    rows = re.findall(r"<td>([^<]*)</td><td[^>]*>(\d+)</td><td>([^<]*)</td>", page)
    assert ("clipped low", "1", "·b ×1") in rows
    assert [name for name, *_ in rows] == ["amplified", "suppressed", "clipped low", "clipped high"]


def test_a_run_opens(run_folder):
    run = open_run(run_folder, "one")
    assert run_names(run_folder) == ["one"]
    assert run.iterations() == [0, 1, 2]
    entries, problems = run.entries(1)
    assert [e.stage for e in entries] == ["eval", "train"] and not problems
    assert entries[1].treated["clipped low"] == {" b": 1}
    assert {name: len(found) for name, found in run.prompts().items()} == {"eval: p": 3, "train: p": 3}
    assert "hapo-card" in views.over_training(run, run.prompts()["eval: p"])
    assert "suppressed" in views.treated(entries)
    lines, problems = run.metrics()
    assert len(lines) == 1
    assert problems == [f"{run.path}/metrics.jsonl:{n}: not a line of metrics" for n in (2, 3)]
    assert "hapo-figure" in views.curves(run)[0]


@pytest.mark.parametrize("name", ["../secret", "..", ".", "", "/etc", "one/../../secret"])
def test_file_choices_stay_inside(run_folder, name):
    (run_folder.parent / "secret" / "traces").mkdir(parents=True)
    with pytest.raises(UserError):
        open_run(run_folder, name)


def test_links_out_of_the_run_are_not_followed(run_folder, tmp_path):
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text((run_folder / "one/traces/000000.jsonl").read_text("utf-8"), "utf-8")
    (run_folder / "one/traces/000007.jsonl").symlink_to(elsewhere)
    traces, [problem] = open_run(run_folder, "one").traces(7)
    assert not traces and "leads out of" in problem


def test_a_broken_line_is_named_and_the_rest_opens(run_folder):
    file = run_folder / "one/traces/000001.jsonl"
    good = file.read_text("utf-8").splitlines()
    text_for_numbers = json.loads(good[0])
    text_for_numbers["tokens"]["entropy"] = ["<b>"] * 6
    file.write_text("\n".join([good[0], '{"a": 1}', "not json", json.dumps(text_for_numbers)]) + "\n", "utf-8")
    run = open_run(run_folder, "one")
    entries, problems = run.entries(1)
    assert len(entries) == 1
    assert f"{file}:2" in problems[0] and f"{file}:3" in problems[1] and f"{file}:4: " in problems[2]
    assert len(run.entries(2)[0]) == 2
    with pytest.raises(UserError, match=":2: "):
        read_traces(file)


BAD_SIGNAL = {"pivot": math.nan, "sigma": 1.0, "high": 1.0, "low": 1.0}
ATTACKS = [["<img src=x>"] * 6, ['"><script>'] * 6]
FOREIGN = [None, 7, "x", [], {}, [["<b>"]], [math.inf] * 6, [-1] * 6, [10**30] * 6, BAD_SIGNAL, *ATTACKS]


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: repr(value)[:12])
def test_foreign_values_are_named_or_shown_as_text(tmp_path, value):
    """Whatever stands in a field: a sentence with file and line, or a page without a tag that is not ours."""
    whole = dataclasses.asdict(trained(make_trace(), Method(), 0.5, [1.0, 0.6, 1.0, 1.2, 1.0, 1.0]))
    lines = [json.dumps(whole | {name: value}) for name in whole]
    for name in (*whole["tokens"], "alternatives"):
        lines.append(json.dumps(whole | {"tokens": whole["tokens"] | {name: value}}))
    file = tmp_path / "one/traces/000000.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(lines), "utf-8")
    run = open_run(tmp_path, "one")
    entries, problems = run.entries(0)
    traces, unread = run.traces(0)
    assert len(traces) + len(unread) == len(lines)
    for problem in problems:
        assert re.match(rf"{file}:\d+: ", problem)
    assert len(entries) == len(traces)
    for trace in traces:
        page = "".join(dataclasses.astuple(views.generation(trace, run.table(trace), Method())))
        assert "<" not in strip_known(page + views.treated(entries))


def test_text_that_is_no_utf8_is_named(run_folder):
    file = run_folder / "one/traces/000001.jsonl"
    good = file.read_bytes().splitlines()
    surrogate = good[0].replace(b'"why?"', b'"\\ud800"')
    file.write_bytes(b"\n".join([good[0], b"\xff" + good[1], surrogate, good[1]]))
    traces, problems = open_run(run_folder, "one").traces(1)
    assert len(traces) == 2
    assert [p.split(": ")[0] for p in problems] == [f"{file}:2", f"{file}:3"]


def test_a_live_run_is_read_again(run_folder):
    run = open_run(run_folder, "one")
    assert len(run.entries(2)[0]) == 2
    write_traces(run_folder / "one/traces", 2, [make_trace()])
    write_traces(run_folder / "one/traces", 3, [make_trace()])
    assert len(run.entries(2)[0]) == 1 and run.iterations() == [0, 1, 2, 3]


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return ModelShelf().get("tiny")


def last(policy, **settings):
    *_, progress = generate(policy, GenerationSettings("3+4*5=?", **settings))
    return progress


def test_a_generation_streams_and_equals_algo(policy):
    progress = last(policy, seed=1)
    trace = progress.trace
    assert progress.ended == "ended by itself" and trace.text
    signal = trace.sampling_signal
    entropy = torch.tensor(trace.tokens["entropy"])
    expected = 1.0 + 0.05 * signal.normalize(entropy)
    assert torch.allclose(torch.tensor(trace.tokens["temperature"]), expected)
    first = trace.tokens["alternatives"][0]
    assert len(first) == 10 and first[0][1] >= first[1][1] and sum(p for _, p, _ in first) <= 1.0 + 1e-9
    h = token_table(trace, tokenizer=policy.tokenizer).numbers["h"]
    assert h == signal.normalize(entropy).tolist()


def test_without_hapo_there_is_one_pass_at_one_temperature(policy):
    items = list(generate(policy, GenerationSettings("3+4*5=?", method=PRESETS["dapo"], temperature=0.7)))
    assert not any(item.first_pass for item in items)
    assert items[-1].trace.tokens["temperature"] == pytest.approx([0.7] * len(items))


def test_limits_end_a_generation(policy):
    assert last(policy, max_new_tokens=3).ended == "cut off at the token limit"
    assert "time limit" in last(policy, seconds=1e-9).ended
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": 10**6}, {"seconds": 1e9}, {"temperature": 0.0}):
        with pytest.raises(UserError):
            GenerationSettings("1+1", **wrong)
    with pytest.raises(UserError, match="tokens; the model takes 256"):
        last_of_long = GenerationSettings("1+1 " * 300)
        list(generate(policy, last_of_long))


def test_an_adapter_is_loaded_and_its_absence_named(policy, tmp_path):
    with torch.no_grad():
        saved = ModelShelf().get("tiny")
        for name, parameter in saved.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    saved.model.save_pretrained(tmp_path / "adapter")
    moved = last(ModelShelf().get("tiny", str(tmp_path / "adapter")), max_new_tokens=1).trace
    assert moved.tokens["entropy"] != last(policy, max_new_tokens=1).trace.tokens["entropy"]
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        ModelShelf().get("tiny", str(tmp_path))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="does not fit"):
        ModelShelf().get("tiny", str(tmp_path / "adapter"))
