"""Tables -> HTML: the coloured text, its legend, and what a token tells when it is pointed at.

Every piece of text that a model or a file may hold passes through `html.escape`, also inside the JSON that the page's
script reads: it sits escaped in a hidden element and is read back as text.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Collection, Sequence
from typing import Any

from hapo_lite.inspect.colour import STEPS, colour_values
from hapo_lite.inspect.tokens import QUANTITIES, TokenTable, show_number, visible
from hapo_lite.trace import Trace

DEFAULT_QUANTITY = "entropy"
LONGEST_PROMPT = 4000
POINT_AT = "Point at a token, tap it, or move along with the arrow keys."


def hidden_json(data: Any, name: str) -> str:
    """Data for the page's script, in a hidden element of class `name`."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f'<div hidden class="{name}">{html.escape(text, quote=False)}</div>'


def content_key(text: str) -> str:
    """Changes with the content, which tells the page's script to read it again."""
    return hashlib.blake2s(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def note(text: str, kind: str = "note") -> str:
    """One sentence. kind: note, error or reading (how to read a view)."""
    return f'<p class="hapo-{kind}" role="{"alert" if kind == "error" else "note"}">{html.escape(text)}</p>'


def token_text(
    table: TokenTable, quantity: str = DEFAULT_QUANTITY, differs: Collection[int] = (), streaming: bool = False
) -> str:
    """The generation as coloured tokens, with a legend and a panel of details that the page's script fills.

    differs: positions to underline. streaming: while tokens still arrive, without the details.
    """
    quantity = quantity if quantity in table.numbers else DEFAULT_QUANTITY
    colours = {
        name: colour_values(values, QUANTITIES[name], table.signal.floor)
        for name, values in table.numbers.items()
        if not streaming or name == quantity
    }
    classes = colours[quantity].classes
    spans = []
    for i, piece in enumerate(table.pieces):
        marks = [classes[i]]
        marks += ["special"] * piece.special + ["part"] * bool(piece.part) + ["differs"] * (i in differs)
        marks += [f"clip-{table.clipped[i]}"] if table.clipped[i] else []
        focus = "0" if i == 0 else "-1"
        # A line may break before a space, which is drawn as a dot and is no place to break by itself.
        brk = "<wbr>" if piece.shown.startswith("·") else ""
        spans.append(
            f'{brk}<span class="t {" ".join(marks)}" data-i="{i}" tabindex="{focus}">{html.escape(piece.shown)}</span>'
        )
    body = f'<div class="hapo-tokens" dir="auto" role="group" aria-label="Tokens">{"".join(spans)}</div>'
    if streaming:
        return f'<section class="hapo-text">{body}</section>'
    options = "".join(_option(name, name == quantity) for name in colours)
    data = {
        "colours": {name: "".join(f"{step:x}" for step in c.steps) for name, c in colours.items()},
        "kinds": {name: c.kind for name, c in colours.items()},
        "labels": {name: QUANTITIES[name].label for name in colours},
        "rows": {name: [show_number(v) for v in values] for name, values in table.numbers.items()},
        "shown": [piece.shown for piece in table.pieces],
        "parts": [piece.part for piece in table.pieces] if any(p.part for p in table.pieces) else [],
        "clipped": table.clipped if any(table.clipped) else [],
        "alternatives": [
            [[visible(text, 40), _percent(base), _percent(moved)] for text, base, moved in choices]
            for choices in table.alternatives
        ],
    }
    hidden = hidden_json(data, "hapo-data")
    legends = "".join(_legend(name, c.kind, c.low, c.high, name == quantity) for name, c in colours.items())
    return (
        f'<section class="hapo-text" data-key="{content_key(hidden)}"><div class="hapo-bar"><label>Colour by '
        f'<select class="hapo-choose">{options}</select></label>{legends}'
        f'<button type="button" class="hapo-png">PNG</button></div>'
        f'<div class="hapo-pair">{body}'
        f'<aside class="hapo-details" aria-live="polite" data-hint="{POINT_AT}">{note(POINT_AT)}</aside>'
        f"</div>{hidden}</section>"
    )


def summary(trace: Trace, table: TokenTable) -> str:
    """The prompt, how the completion ended, and what h was measured against."""
    prompt = "".join(
        f'<div class="hapo-message"><span class="hapo-role">{html.escape(str(role))}</span>'
        f'<span dir="auto">{html.escape(_cut(str(content)))}</span></div>'
        for role, content in trace.messages
    )
    entropy = table.numbers["entropy"]
    facts = [f"{len(table):,} tokens", f"mean entropy {show_number(sum(entropy) / len(entropy))} nats"]
    if trace.gold:
        facts.append(f"gold answer {_cut(trace.gold, 80)}")
    if trace.outcome:
        facts.append(trace.outcome)
    if trace.truncated:
        facts.append("cut off")
    counts = count_treated(table)
    facts += [f"{count} {name}" for name, count in counts.items() if count]
    chips = "".join(f'<span class="hapo-chip">{html.escape(fact)}</span>' for fact in facts)
    return (
        f'<div class="hapo-summary">{prompt}<div>{chips}</div>{note(f"h is measured with {table.signal_from}.")}</div>'
    )


def count_treated(table: TokenTable) -> dict[str, int]:
    """How many tokens the update amplified, suppressed, or clipped low or high; nothing where there was no update."""
    if "credit" not in table.numbers:
        return {}
    pairs = list(zip(table.numbers["credit"], table.numbers["advantage"], strict=True))
    return {
        "amplified": sum(abs(c) > abs(a) for c, a in pairs),
        "suppressed": sum(abs(c) < abs(a) for c, a in pairs),
        "clipped low": table.clipped.count("low"),
        "clipped high": table.clipped.count("high"),
    }


def small_text(table: TokenTable) -> str:
    """A completion in one paragraph, coloured by entropy, without details: for lists of many."""
    classes = colour_values(table.numbers["entropy"], QUANTITIES["entropy"], table.signal.floor).classes
    spans = "".join(
        f'<span class="t {c}">{html.escape(piece.shown)}</span>' for c, piece in zip(classes, table.pieces, strict=True)
    )
    return f'<div class="hapo-text hapo-small"><div class="hapo-tokens" dir="auto">{spans}</div></div>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """(heading, mark, HTML) -> a list of cards. mark: an outcome, shown beside the heading. The HTML is ours."""
    return "".join(
        f'<article class="hapo-card"><header>{html.escape(heading)} <b class="hapo-chip">{html.escape(mark)}</b>'
        f"</header>{inner}</article>"
        for heading, mark, inner in items
    )


def plain_table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A table of text and numbers."""
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return (
        f'<div class="hapo-scroll"><table class="hapo-table"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _option(name: str, chosen: bool) -> str:
    return f'<option value="{name}"{" selected" if chosen else ""}>{html.escape(QUANTITIES[name].label)}</option>'


def _legend(name: str, kind: str, low: float, high: float, chosen: bool) -> str:
    swatches = "".join(f'<i class="{kind}{step:x}"></i>' for step in range(STEPS[kind]))
    hidden = "" if chosen else " hidden"
    return (
        f'<span class="hapo-legend" data-name="{name}"{hidden} title="{html.escape(QUANTITIES[name].meaning)}">'
        f"{show_number(low)} {swatches} {show_number(high)}</span>"
    )


def _percent(probability: float) -> str:
    return f"{100.0 * probability:.3g} %".replace("-", "−")


def _cut(text: str, longest: int = LONGEST_PROMPT) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"
