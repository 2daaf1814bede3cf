"""HTML of two rules on a recorded run: a sentence, who is treated how under both, four quadrants, and two texts."""

from __future__ import annotations

import html
from dataclasses import replace

from hapo_lite.errors import counted
from hapo_lite.inspect import markup
from hapo_lite.inspect.rules import TREATMENTS, Quadrant, RuleComparison, Ruled
from hapo_lite.inspect.tokens import TokenTable

LONGEST_NAME = 40
SHOWN = ("h", "ratio", "advantage")
"""The quantities of a recorded completion that both texts show."""


def comparison_html(found: RuleComparison, names: tuple[str, str], recorded: int) -> str:
    """The iteration in sum. names: of the left and the right rule. recorded: completions that are compared."""
    left, right = (html.escape(name[:LONGEST_NAME]) for name in names)
    share = f"{100.0 * found.differing / found.tokens:.0f} %"
    lead = (
        f'<p class="hapo-rules-lead"><b>{found.differing:,}</b> of {counted(found.tokens, "token")} ({share}) are '
        f"treated differently by <b>{left}</b> and <b>{right}</b>, in {counted(recorded, 'recorded completion')}.</p>"
    )
    return (
        f'<section class="hapo-rules">{lead}<div class="hapo-rules-pair">{_pairs(found, left, right)}'
        f"{_quadrants(found, left, right)}</div></section>"
    )


def _pairs(found: RuleComparison, left: str, right: str) -> str:
    """Tokens by their treatment under both rules. Those on the diagonal are treated alike."""
    most = max(found.pairs.values())
    used = [name for name in TREATMENTS if any(name in pair for pair in found.pairs)]
    head = "".join(f'<th scope="col">{name}</th>' for name in used)
    rows = ""
    for one in used:
        cells = ""
        for other in used:
            count = found.pairs[one, other]
            kind = "same" if one == other else "other"
            shade = f' style="--share:{count / most:.3f}"' if count else ""
            cells += f'<td class="{kind}"{shade}>{count:,}</td>'
        total = sum(found.pairs[one, other] for other in used)
        rows += f'<tr><th scope="row">{one}</th>{cells}<td class="n">{total:,}</td></tr>'
    sums = "".join(f'<td class="n">{sum(found.pairs[one, other] for one in used):,}</td>' for other in used)
    body = f'{rows}<tr><th scope="row">all</th>{sums}<td class="n">{found.tokens:,}</td></tr>'
    return (
        f'<div><p class="hapo-note">Rows: {left}. Columns: {right}. Treated alike: the diagonal.</p>'
        f'<div class="hapo-scroll"><table class="hapo-treated" aria-label="Tokens by treatment">'
        f'<thead><tr><td></td>{head}<th scope="col">all</th></tr></thead><tbody>{body}</tbody></table></div></div>'
    )


def _quadrants(found: RuleComparison, left: str, right: str) -> str:
    """Entropy times the sign of the advantage: the number of tokens, and the share of the gradient that they have."""
    counts = sum(q.tokens for q in found.quadrants.values()) or 1
    rows = ""
    for uncertain in (True, False):
        name = "uncertain" if uncertain else "certain"
        cells = "".join(_quadrant(found.quadrants[uncertain, up], counts, left, right) for up in (True, False))
        rows += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    head = '<td></td><th scope="col">A &gt; 0</th><th scope="col">A &lt; 0</th>'
    explained = (
        "Tokens, and their share of the gradient (the sum of its size over tokens). Uncertain: above the pivot of the "
        "iteration."
    )
    return (
        f'<div>{markup.note(explained)}<table class="hapo-quadrants" aria-label="Quadrants"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _quadrant(one: Quadrant, counts: int, left: str, right: str) -> str:
    bars = "".join(
        f'<span>{name}</span><i style="--share:{share:.4f}"></i><b>{100.0 * share:.0f} %</b>'
        for name, share in ((left, one.left), (right, one.right))
    )
    tokens = f"{one.tokens:,} tokens, {100.0 * one.tokens / counts:.0f} %"
    return f'<td><strong>{tokens}</strong><div class="hapo-bars">{bars}</div></td>'


def text_html(table: TokenTable, one: Ruled, other: Ruled, name: str) -> str:
    """One completion under one rule, coloured by credit. Tokens that `other` treats differently are underlined.

    table: of the recorded completion. name: of the rule.
    """
    differs = [i for i, pair in enumerate(zip(one.treatment, other.treatment, strict=True)) if pair[0] != pair[1]]
    marked = counted(len(differs), "token")
    heading = f'<h3 class="hapo-h">{html.escape(name[:LONGEST_NAME])}</h3>'
    return (
        heading
        + markup.note(f"{marked} of {len(table):,} differ from the other rule, and are underlined.")
        + (markup.token_text(_table(table, one), "credit", differs, spans=_spans(table, one, other)))
    )


def _table(table: TokenTable, one: Ruled) -> TokenTable:
    """The table of a completion with the numbers that a rule gives it.

    It holds no entropy, which the page would otherwise colour it by, as it does with the texts of other tabs.
    """
    numbers = {"credit": one.credit} | {name: table.numbers[name] for name in SHOWN}
    numbers |= {"lower": one.lower, "upper": one.upper, "weight": _weights(table, one)}
    return replace(table, numbers=numbers, clipped=one.clipped, alternatives=[[] for _ in table.pieces])


def _weights(table: TokenTable, one: Ruled) -> list[float]:
    pairs = zip(one.credit, table.numbers["advantage"], strict=True)
    return [credit / advantage if advantage else 1.0 for credit, advantage in pairs]


def _spans(table: TokenTable, one: Ruled, other: Ruled) -> markup.Spans:
    """Scales on which a colour means the same number in both texts."""
    return markup.shared_spans([_table(table, one), _table(table, other)])
