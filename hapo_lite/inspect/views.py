"""The content of the inspector's tabs, built from tables, markup and figures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from hapo_lite.algo.methods import Method
from hapo_lite.inspect import figures, markup
from hapo_lite.inspect.colour import span_of
from hapo_lite.inspect.runs import Entry, Run, treated_together
from hapo_lite.inspect.tokens import QUANTITIES, TokenTable, dual_entropy, show_number, visible
from hapo_lite.runs.trace import Trace

MOST_CARDS = 60
"""Completions that a list shows. The rest is counted."""
MOST_TEXTS = 12
"""Different tokens of one treatment that are named."""


@dataclass(frozen=True)
class Shown:
    """One generation and the method that its what-if uses."""

    trace: Trace
    table: TokenTable
    method: Method


@dataclass(frozen=True)
class Generation:
    """The HTML of one generation: the facts, the tokens, the figures and its dual-entropy words."""

    summary: str
    tokens: str
    figures: str
    words: str


def generation(trace: Trace, table: TokenTable, method: Method, csv: str = "") -> Generation:
    """The HTML of one generation. csv: the id of the page's download of the tokens."""
    return Generation(
        summary=markup.summary(trace, table),
        tokens=markup.token_text(table, csv=csv),
        figures=f'<div class="hapo-figures">{figures.token_figures(table, method)}</div>',
        words=dual_words([table]),
    )


def what_if(table: TokenTable, method: Method, ratio: float, right: bool) -> str:
    """The what-if figure. right: whether the completion's advantage is 1; otherwise it is -1."""
    return figures.figure_html(
        figures.what_if_figure(table, method, ratio, 1.0 if right else -1.0),
        "what_if",
        f"Advantage of every token if its ratio were {show_number(ratio)} and the answer "
        f"{'right' if right else 'wrong'}; dashed: before redistribution; hollow: clipping stops its gradient "
        "(Eq. 10-13).",
    )


def dual_words(tables: Sequence[TokenTable]) -> str:
    """A figure of the words that occur at high and at low entropy, or a note if there are none."""
    words = dual_entropy(tables)
    if not words:
        return markup.note("No word here occurs both above and below the pivot.")
    return figures.figure_html(
        figures.dual_entropy_figure(words),
        "dual_entropy",
        "The same word at low and at high entropy: the position decides, not the word. Each dot is one occurrence. All "
        "these words lie on both sides of the pivot (Eq. 5-6).",
    )


def differing(left: Sequence[int], right: Sequence[int]) -> tuple[set[int], set[int]]:
    """The positions of the tokens on each side that have no counterpart on the other side."""
    blocks = difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    same_left = {b.a + i for b in blocks for i in range(b.size)}
    same_right = {b.b + i for b in blocks for i in range(b.size)}
    return set(range(len(left))) - same_left, set(range(len(right))) - same_right


@dataclass(frozen=True)
class Comparison:
    """The HTML of two generations. sides: (facts, tokens) of the left and the right one, with differences marked."""

    sentence: str
    sides: list[tuple[str, str]]
    figures: str


def comparison(left: Shown, right: Shown, csv: Sequence[str] = ("", "")) -> Comparison:
    """The HTML of two generations. csv: the ids of the page's downloads of the left and the right tokens."""
    marks = differing(left.trace.tokens["id"], right.trace.tokens["id"])
    spans = markup.shared_spans([left.table, right.table])
    sides = [
        (
            markup.summary(shown.trace, shown.table),
            markup.token_text(shown.table, differs=mark, spans=spans, csv=download),
        )
        for shown, mark, download in zip((left, right), marks, csv, strict=True)
    ]
    drawn = [
        figures.figure_html(
            figures.side_by_side_figure(left.table, right.table, "entropy", "entropy, nats"),
            "entropy_both",
            "Entropy of every token on both sides, log axis. The lines coincide where the texts agree (Eq. 5).",
        ),
        figures.figure_html(
            figures.side_by_side_figure(left.table, right.table, "temperature", "temperature"),
            "temperature_both",
            "Sampling temperature of every token on both sides; flat without the adaptive temperature (Eq. 8).",
        ),
    ]
    sentence = _difference(left, right, marks)
    return Comparison(markup.note(sentence), sides, f'<div class="hapo-figures">{"".join(drawn)}</div>')


def _difference(left: Shown, right: Shown, marks: tuple[set[int], set[int]]) -> str:
    """A sentence that says where the texts differ. marks: from `differing`."""
    if not any(marks):
        return "Both sides wrote the same tokens. Their entropies and temperatures may still differ."
    ids_left, ids_right = left.trace.tokens["id"], right.trace.tokens["id"]
    shorter = min(len(ids_left), len(ids_right))
    same = next((i for i in range(shorter) if ids_left[i] != ids_right[i]), shorter)
    return (
        f"The first {same} tokens agree. {len(marks[0])} of {len(ids_left)} on the left and {len(marks[1])} of "
        f"{len(ids_right)} on the right have no counterpart and are underlined."
    )


def curves(run: Run, other: Run | None = None) -> tuple[str, list[str]]:
    """The run's metrics as figures, and a sentence for each line that could not be read. other: drawn dashed."""
    lines, problems = run.metrics()
    more, more_problems = other.metrics() if other else ([], [])
    parts = [
        figures.figure_html(
            figure, heading.split(",")[0].replace(" ", "_"), f"{heading[0].upper()}{heading[1:]}, by iteration"
        )
        for heading, figure in figures.curve_figures(lines, more)
    ]
    if not parts:
        return markup.note("This run has no metrics yet."), problems + more_problems
    return f'<div class="hapo-figures hapo-curves">{"".join(parts)}</div>', problems + more_problems


def treated(entries: Sequence[Entry]) -> str:
    """A table of the tokens of each treatment: their number by outcome, and the most frequent texts."""
    trained = [e for e in entries if e.treated]
    if not trained:
        return markup.note("No completion here took part in an update.")
    outcomes = sorted({e.outcome for e in trained})
    by_outcome = [treated_together([e for e in trained if e.outcome == outcome]) for outcome in outcomes]
    rows = []
    for name, texts in treated_together(trained).items():
        often = "   ".join(f"{visible(text, 40).strip()} ×{count}" for text, count in texts.most_common(MOST_TEXTS))
        rows.append([name, *(found[name].total() for found in by_outcome), often or "none"])
    head = [f"{o}, of {sum(e.length for e in trained if e.outcome == o):,} tokens" for o in outcomes]
    caption = "Tokens that the update amplified or suppressed (Eq. 10-11), or clipped low or high (Eq. 12-13)"
    return markup.plain_table(["treatment", *head, "most often"], rows, caption, "treated")


def right_against_wrong(run: Run, entries: Sequence[Entry]) -> tuple[str, str]:
    """An iteration's right completions and its other ones, as two lists of cards on one scale."""
    right = [e for e in entries if e.outcome == "correct"]
    wrong = [e for e in entries if e.outcome != "correct"]
    tables = [_tables(run, right), _tables(run, wrong)]
    span = _entropy_span([*tables[0], *tables[1]])
    return _cards("right", right, tables[0], span), _cards("wrong", wrong, tables[1], span)


def over_training(run: Run, entries: Sequence[Entry]) -> str:
    """One prompt's completions, from the first iteration to the last."""
    tables = _tables(run, entries)
    return _cards("over_training", entries, tables, _entropy_span(tables))


def iteration_words(run: Run, entries: Sequence[Entry]) -> str:
    """Dual-entropy words over an iteration's completions."""
    return dual_words(_tables(run, entries))


def _tables(run: Run, entries: Sequence[Entry]) -> list[TokenTable]:
    """The tables of the first MOST_CARDS entries."""
    return [run.table(run.trace_of(entry)) for entry in entries[:MOST_CARDS]]


def _entropy_span(tables: Sequence[TokenTable]) -> tuple[float, float]:
    return span_of([v for table in tables for v in table.numbers["entropy"]], QUANTITIES["entropy"])


def _cards(name: str, entries: Sequence[Entry], tables: Sequence[TokenTable], span: tuple[float, float]) -> str:
    """A list of cards. tables: those of the first entries, which are shown. The other entries are counted."""
    if not entries:
        return markup.note("There are no such completions.")
    items = []
    for entry, table in zip(entries, tables, strict=False):
        heading = f"iteration {entry.iteration} · {entry.stage} · {entry.prompt_id} · sample {entry.sample}"
        body = markup.small_text(table, span)
        items.append(markup.Card(f"{heading} · {entry.length:,} tokens", entry.outcome, body))
    more = len(entries) - len(items)
    below = markup.note(f"and {more:,} more") if more > 0 else ""
    return markup.cards(items, name, markup.entropy_legend(span)) + below
