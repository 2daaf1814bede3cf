"""What the tabs of app.py show, put together from tables, markup and figures."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.inspect import figures, markup
from hapo_lite.inspect.runs import Entry, Run, treated_counts
from hapo_lite.inspect.tokens import TokenTable, dual_entropy, show_number
from hapo_lite.trace import Trace

MOST_CARDS = 60
"""Completions of a list that are drawn; the rest is counted."""


def method_of(hapo: bool, tau: float, rho: float) -> Method:
    """HAPO with these constants, or DAPO, which is HAPO with all its pieces off."""
    return replace(PRESETS["hapo" if hapo else "dapo"], tau=tau, quantile=rho)


@dataclass(frozen=True)
class Generation:
    """HTML of one generation: the facts, the tokens, the figures and its dual-entropy words."""

    summary: str
    tokens: str
    figures: str
    words: str


def generation(trace: Trace, table: TokenTable, method: Method) -> Generation:
    return Generation(
        summary=markup.summary(trace, table),
        tokens=markup.token_text(table),
        figures=f'<div class="hapo-figures">{figures.token_figures(table, method)}</div>',
        words=dual_words([table]),
    )


def what_if(table: TokenTable, method: Method, ratio: float, right: bool) -> str:
    """The what-if figure: the completion's advantage is 1 where right, -1 where wrong."""
    return figures.figure_html(
        figures.what_if_figure(table, method, ratio, 1.0 if right else -1.0),
        "what_if",
        f"Advantage of every token if its ratio were {show_number(ratio)} and the answer "
        f"{'right' if right else 'wrong'}; dashed: before redistribution; hollow: clipping stops its gradient "
        "(Eq. 10-13).",
    )


def dual_words(tables: Sequence[TokenTable]) -> str:
    """The same word at high and at low entropy."""
    words = dual_entropy(tables)
    if not words:
        return markup.note("No word here occurs both above and below the pivot.")
    return figures.figure_html(
        figures.dual_entropy_figure(words),
        "dual_entropy",
        "The same word at low and at high entropy: what counts is the place, not the word. Each dot is one occurrence; "
        "all these words lie on both sides of the pivot (Eq. 5-6).",
    )


def differing(left: Sequence[int], right: Sequence[int]) -> tuple[set[int], set[int]]:
    """Positions of the tokens of each side that have no counterpart on the other."""
    blocks = difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    same_left = {b.a + i for b in blocks for i in range(b.size)}
    same_right = {b.b + i for b in blocks for i in range(b.size)}
    return set(range(len(left))) - same_left, set(range(len(right))) - same_right


def comparison(left: tuple[Trace, TokenTable], right: tuple[Trace, TokenTable]) -> tuple[str, str, str]:
    """(one sentence, left HTML, right HTML), with the tokens that differ marked."""
    ids = left[0].tokens["id"], right[0].tokens["id"]
    marks = differing(*ids)
    first = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
    if not any(marks):
        sentence = "Both wrote the same tokens; their entropies and temperatures may still differ."
    else:
        sentence = (
            f"The first {first} tokens agree; {len(marks[0])} of {len(ids[0])} on the left and {len(marks[1])} of "
            f"{len(ids[1])} on the right have no counterpart and are underlined."
        )
    sides = [
        markup.summary(trace, table) + markup.token_text(table, differs=mark)
        for (trace, table), mark in zip((left, right), marks, strict=True)
    ]
    return markup.note(sentence), *sides


def curves(run: Run) -> tuple[str, list[str]]:
    """The run's metrics as figures, and what could not be read."""
    lines, problems = run.metrics()
    parts = [
        figures.figure_html(
            figure, heading.split(",")[0].replace(" ", "_"), f"{heading[0].upper()}{heading[1:]}, by iteration"
        )
        for heading, figure in figures.curve_figures(lines)
    ]
    if not parts:
        return markup.note("This run has no metrics yet."), problems
    return f'<div class="hapo-figures">{"".join(parts)}</div>', problems


def treated(entries: Sequence[Entry]) -> str:
    """Counts of what the update did to tokens, by outcome."""
    trained = [e for e in entries if e.treated]
    if not trained:
        return markup.note("No completion here took part in an update.")
    rows = []
    for outcome in sorted({e.outcome for e in trained}):
        mine = [e for e in trained if e.outcome == outcome]
        rows.append([outcome, len(mine), sum(e.length for e in mine), *treated_counts(mine).values()])
    head = ["outcome", "completions", "tokens", *treated_counts([])]
    return markup.plain_table(head, rows, "Tokens amplified, suppressed (Eq. 10-11), clipped low or high (Eq. 12-13)")


def right_against_wrong(run: Run, iteration: int, entries: Sequence[Entry]) -> tuple[str, str]:
    """An iteration's right completions and its others, as two lists of cards."""
    right = [e for e in entries if e.outcome == "correct"]
    wrong = [e for e in entries if e.outcome != "correct"]
    return _cards(run, right), _cards(run, wrong)


def over_training(run: Run, entries: Sequence[Entry]) -> str:
    """One prompt's completions, from the first iteration to the last."""
    return f'<div class="hapo-cards">{_cards(run, entries, with_iteration=True)}</div>'


def iteration_words(run: Run, entries: Sequence[Entry]) -> str:
    """Dual-entropy words over an iteration's completions."""
    return dual_words([run.table(_trace(run, entry)) for entry in entries[:MOST_CARDS]])


def _trace(run: Run, entry: Entry) -> Trace:
    return run.traces(entry.iteration)[0][entry.place]


def _cards(run: Run, entries: Sequence[Entry], with_iteration: bool = False) -> str:
    if not entries:
        return markup.note("None here.")
    items = []
    for entry in entries[:MOST_CARDS]:
        place = f"iteration {entry.iteration} · " if with_iteration else f"{entry.stage} · {entry.prompt_id} · "
        heading = f"{place}sample {entry.sample} · {entry.length:,} tokens"
        items.append((heading, entry.outcome, markup.small_text(run.table(_trace(run, entry)))))
    more = len(entries) - len(items)
    return markup.cards(items) + (markup.note(f"and {more:,} more") if more > 0 else "")
