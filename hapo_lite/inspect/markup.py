"""HTML from tables: the coloured text, its legend, and the details of a token that a reader points at.

Every piece of text from a model or a file passes through `html.escape`. The JSON for the page's script does so too: it
is escaped in a hidden element, and the script reads it back as text. The tokens are formatted by hand, because a page
has thousands of them and is made anew as they arrive, and jinja takes about 25 times as long.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from hapo_lite.errors import counted
from hapo_lite.inspect.colour import STEPS, Colouring, colour_values, span_of
from hapo_lite.inspect.tokens import QUANTITIES, TokenTable, show_number, treated_tokens, visible
from hapo_lite.runs.trace import Trace

DEFAULT_QUANTITY = "entropy"
LONGEST_PROMPT = 4000
POINT_AT = "Point at a token, or move along with the arrow keys. A click or a tap keeps its numbers here."


def hidden_json(data: Any, name: str) -> str:
    """A hidden element of class `name` that holds data for the page's script as JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f'<div hidden class="{name}">{html.escape(text, quote=False)}</div>'


def content_key(text: str) -> str:
    """A digest of the content. When it changes, the page's script reads the element again."""
    return hashlib.blake2s(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def note(text: str, kind: str = "note") -> str:
    """A paragraph with one sentence. kind: note, error, or reading for a sentence that explains a view."""
    return f'<p class="hapo-{kind}" role="{"alert" if kind == "error" else "note"}">{html.escape(text)}</p>'


Spans = dict[str, tuple[float, float]]
"""The ends of the colour scale of each quantity."""


def shared_spans(tables: Sequence[TokenTable]) -> Spans:
    """Scales for several texts, on which a colour means the same number in all of them."""
    names = [name for name in tables[0].numbers if all(name in table.numbers for table in tables)]
    return {
        name: span_of([v for table in tables for v in table.numbers[name]], QUANTITIES[name], tables[0].signal.floor)
        for name in names
    }


def token_text(
    table: TokenTable,
    quantity: str = DEFAULT_QUANTITY,
    differs: Collection[int] = (),
    streaming: bool = False,
    spans: Spans | None = None,
    csv: str = "",
) -> str:
    """The generation as coloured tokens, with a legend and a panel of details that the page's script fills.

    quantity: the one that colours the tokens at first. differs: positions to underline. streaming: tokens still arrive,
    so the details are left out. spans: scales that another text shares. csv: the id of the page's download, which a
    button beside the legend starts; "": no such button.
    """
    quantity = quantity if quantity in table.numbers else DEFAULT_QUANTITY
    spans = _credit_span(table) | (spans or {})
    colours = {
        name: colour_values(values, QUANTITIES[name], table.signal.floor, spans.get(name))
        for name, values in table.numbers.items()
    }
    data = {
        "colours": {name: "".join(f"{step:x}" for step in c.steps) for name, c in colours.items()},
        "kinds": {name: c.kind for name, c in colours.items()},
    }
    hidden = hidden_json(data if streaming else data | _details(table), "hapo-data")
    options = "".join(_option(name, name == quantity) for name in colours)
    legends = "".join(_legend(name, c, name == quantity) for name, c in colours.items())
    meanings = "".join(_meaning(name, name == quantity) for name in colours)
    return (
        f'<section class="hapo-text" data-key="{content_key(hidden)}" data-name="tokens" data-csv="{csv}" '
        f'data-first="{_first(table)}">'
        f'<div class="hapo-bar"><label>Colour by <select class="hapo-choose">{options}</select></label>{legends}'
        f"{'' if streaming else export_buttons(csv=bool(csv))}</div>{meanings}"
        f'<div class="hapo-pair"><div class="hapo-tokens" dir="auto" role="group" aria-label="Tokens">'
        f'{_spans(table, colours[quantity], differs)}</div><aside class="hapo-details" aria-live="polite" '
        f'data-hint="{POINT_AT}">{note(POINT_AT)}</aside></div>{hidden}</section>'
    )


def _first(table: TokenTable) -> int:
    """The token whose numbers show at first: the most uncertain one, or the first one of a table without entropy."""
    entropy = table.numbers.get("entropy")
    return max(range(len(table)), key=entropy.__getitem__) if entropy else 0


def _credit_span(table: TokenTable) -> Spans:
    """One scale for the credit before and after, so that a reader can compare their colours."""
    names = [name for name in ("advantage", "credit") if name in table.numbers]
    both = [v for name in names for v in table.numbers[name]]
    return dict.fromkeys(names, span_of(both, QUANTITIES["credit"])) if names else {}


def _spans(table: TokenTable, colouring: Colouring, differs: Collection[int]) -> str:
    """An element for each token, with the classes that its colour, its kind and its clipping give it."""
    spans = []
    for i, (piece, colour, clipped) in enumerate(zip(table.pieces, colouring.classes, table.clipped, strict=True)):
        marks = ["t", colour]
        if piece.special:
            marks.append("special")
        if piece.part:
            marks.append("part")
        if i in differs:
            marks.append("differs")
        if clipped:
            marks.append(f"clip-{clipped}")
        focus = "0" if i == 0 else "-1"
        # A space is drawn as a dot, where a browser does not break a line by itself.
        line_break = "<wbr>" if piece.shown.startswith("·") else ""
        spans.append(
            f'{line_break}<span class="{" ".join(marks)}" data-i="{i}" tabindex="{focus}">'
            f"{html.escape(piece.shown)}</span>"
        )
    return "".join(spans)


def _details(table: TokenTable) -> dict[str, Any]:
    """The data from which the page's script shows the details of a token."""
    return {
        "labels": {name: QUANTITIES[name].label for name in table.numbers},
        "rows": {name: [QUANTITIES[name].show(v) for v in values] for name, values in table.numbers.items()},
        "shown": [piece.shown for piece in table.pieces],
        "parts": [piece.part for piece in table.pieces] if any(p.part for p in table.pieces) else [],
        "clipped": table.clipped if any(table.clipped) else [],
        "alternatives": [
            [[visible(text, 40), _percent(base), _percent(moved)] for text, base, moved in choices]
            for choices in table.alternatives
        ],
    }


def export_buttons(csv: bool = True) -> str:
    """Buttons that save the content of the section they are in. csv: whether there is one for CSV."""
    more = '<button type="button" class="hapo-save" data-kind="csv">CSV</button>' if csv else ""
    return f'<span class="hapo-saves"><button type="button" class="hapo-save" data-kind="png">PNG</button>{more}</span>'


def summary(trace: Trace, table: TokenTable) -> str:
    """The prompt, the facts about the completion, and the tokens that its h is measured with."""
    entropy = table.numbers["entropy"]
    facts = [counted(len(table), "token"), f"mean entropy {show_number(sum(entropy) / len(entropy))} nats"]
    if trace.gold:
        facts.append(f"gold answer {_cut(trace.gold, 80)}")
    if trace.outcome:
        facts.append(trace.outcome)
    if trace.truncated:
        facts.append("cut off")
    if trace.rewards:
        facts.append(f"reward {show_number(trace.reward)}")
        facts += [f"{_cut(name, 40)} {show_number(value)}" for name, value in trace.rewards.items()]
    facts += [f"{len(found)} {name}" for name, found in treated_tokens(trace).items() if len(found)]
    reading = note(f"h is measured with {table.signal_from}.")
    return f'<div class="hapo-summary">{messages(trace.messages)}<div>{chips(facts)}</div>{reading}</div>'


def messages(prompt: Sequence[tuple[str, str]]) -> str:
    """A prompt: each message with its role."""
    return "".join(
        f'<div class="hapo-message"><span class="hapo-role">{html.escape(str(role))}</span>'
        f'<span dir="auto">{html.escape(_cut(str(content)))}</span></div>'
        for role, content in prompt
    )


def chips(facts: Sequence[str]) -> str:
    """Short facts, each in a frame."""
    return "".join(f'<span class="hapo-chip">{html.escape(fact)}</span>' for fact in facts)


def small_text(
    table: TokenTable,
    span: tuple[float, float] | None = None,
    marks: Mapping[int, str] | None = None,
    window: range | None = None,
) -> str:
    """A completion as one paragraph, coloured by entropy, without details. Lists of completions show it.

    marks: classes of the tokens at some positions. window: the positions that are shown; None: all of them.
    """
    marks = marks or {}
    shown = range(len(table)) if window is None else window[: max(0, len(table) - window.start)]
    classes = colour_values(table.numbers["entropy"], QUANTITIES["entropy"], table.signal.floor, span).classes
    spans = "".join(
        f'<span class="t {classes[i]} {marks.get(i, "")}">{html.escape(table.pieces[i].shown)}</span>' for i in shown
    )
    before = '<span class="hapo-gap">… </span>' if shown.start else ""
    after = '<span class="hapo-gap"> …</span>' if shown.stop < len(table) else ""
    return f'<div class="hapo-text hapo-small"><div class="hapo-tokens" dir="auto">{before}{spans}{after}</div></div>'


def entropy_legend(span: tuple[float, float]) -> str:
    """The scale of `small_text`."""
    legend = _legend("entropy", colour_values([], QUANTITIES["entropy"], span=span), True)
    return f"<span>Entropy, nats</span>{legend}"


class Card(NamedTuple):
    """One completion in a list. outcome: shown beside the heading. body: HTML that this package made."""

    heading: str
    outcome: str
    body: str


def cards(items: Sequence[Card], name: str, above: str = "") -> str:
    """A list of cards. name: that of the files that its buttons save. above: HTML to the left of the buttons."""
    inner = "".join(
        f'<article class="hapo-card"><header>{html.escape(_cut(heading, 200))} '
        f'<b class="hapo-chip">{html.escape(outcome)}</b></header>{body}</article>'
        for heading, outcome, body in items
    )
    return (
        f'<section class="hapo-list" data-name="{name}"><div class="hapo-bar">{above}{export_buttons()}</div>'
        f'<div class="hapo-cards">{inner}</div></section>'
    )


def plain_table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str, name: str) -> str:
    """A table of text and numbers. name: that of the files that its buttons save."""

    def cell(value: Any, tag: str, number: bool) -> str:
        look = ' class="n"' if number else ""
        return f"<{tag}{look}>{html.escape(str(value))}</{tag}>"

    numbers = [isinstance(value, int) for value in rows[0]]
    top = "".join(cell(title, "th", number) for title, number in zip(head, numbers, strict=True))
    lines = ("".join(cell(v, "td", number) for v, number in zip(row, numbers, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<section class="hapo-list" data-name="{name}"><div class="hapo-bar"><span>{html.escape(caption)}</span>'
        f'{export_buttons()}</div><div class="hapo-scroll"><table class="hapo-table"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _option(name: str, chosen: bool) -> str:
    return f'<option value="{name}"{" selected" if chosen else ""}>{html.escape(QUANTITIES[name].label)}</option>'


def _legend(name: str, colouring: Colouring, chosen: bool) -> str:
    """The scale of a quantity, or its categories that occur."""
    hidden = "" if chosen else " hidden"
    start = f'<span class="hapo-legend" data-name="{name}"{hidden}>'
    names = QUANTITIES[name].names
    if names:
        found = sorted(set(colouring.steps))
        return start + "".join(f'<i class="c{code}"></i><b>{names[code]}</b>' for code in found) + "</span>"
    swatches = "".join(f'<i class="{colouring.kind}{step:x}"></i>' for step in range(STEPS[colouring.kind]))
    return f"{start}{show_number(colouring.low)} {swatches} {show_number(colouring.high)}</span>"


def _meaning(name: str, chosen: bool) -> str:
    """The sentence that says what a quantity is."""
    hidden = "" if chosen else " hidden"
    return f'<p class="hapo-note hapo-meaning" data-name="{name}"{hidden}>{html.escape(QUANTITIES[name].meaning)}.</p>'


def _percent(probability: float) -> str:
    return f"{100.0 * probability:.3g} %".replace("-", "−")


def _cut(text: str, longest: int = LONGEST_PROMPT) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"
