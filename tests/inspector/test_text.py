"""Text in the inspector: hostile text is escaped, and characters in several tokens are put together."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import pytest
from transformers import AutoTokenizer

from hapo_lite.algo.methods import Method
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tokens import csv_text, show_number, token_pieces, token_table, visible
from hapo_lite.model.origins import TINY_MODEL
from tests.inspector.traces import HOSTILE, make_trace, strip_known


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def test_hostile_text_is_text_everywhere():
    alternatives = [[[text, 0.5, 0.4] for text in HOSTILE] for _ in HOSTILE]
    trace = make_trace(HOSTILE, messages=[["<i>", "<script>"]], gold="<gold>", outcome="<b>", rewards={"<u>": 0.5})
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


def test_a_completion_shows_each_of_its_rewards():
    trace = make_trace(reward=0.85, rewards={"correct": 1.0, "brief": -0.15})
    summary = markup.summary(trace, token_table(trace))
    for fact in (f"reward {show_number(0.85)}", f"correct {show_number(1.0)}", f"brief {show_number(-0.15)}"):
        assert f'<span class="hapo-chip">{fact}</span>' in summary
    single = make_trace(reward=0.85)
    assert "reward" not in markup.summary(single, token_table(single))


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
