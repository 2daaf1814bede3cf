"""The table of an iteration's prompts, and the page of a group with its completions beside one another."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hapo_lite.errors import counted
from hapo_lite.inspect import markup
from hapo_lite.inspect.colour import span_of
from hapo_lite.inspect.groups import Branch, Group, groups_of, mean, prefix_tree
from hapo_lite.inspect.places import Place
from hapo_lite.inspect.runs import Entry, Run, entry_of
from hapo_lite.inspect.tokens import QUANTITIES, TokenTable, show_number, visible
from hapo_lite.runs.trace import Trace

MOST_COMPLETIONS = 64
"""Completions of a group that are shown. The rest is counted."""
MOST_TOKENS = 400
"""Tokens of a completion that the group's page shows, from shortly before the place where it parts from the others."""
BEFORE_PARTING = 60
SHORT = 60
"""Completions of at most this mean length, tokens, are shown one below the other, so that the eye can compare them."""


@dataclass(frozen=True)
class Answer:
    """A completion of a group as the page shows it. place: its address. title: its name among its group."""

    place: Place
    title: str
    entry: Entry
    table: TokenTable
    ids: list[int]


def answers(run: Run, place: Place, group: Group) -> list[Answer]:
    """The first MOST_COMPLETIONS of a group. place: that of the group. Raises UserError if the file has lost one."""
    shown = []
    for entry in group.entries[:MOST_COMPLETIONS]:
        trace = run.trace_of(entry)
        where = replace(place, completion=entry.place)
        shown.append(Answer(where, f"sample {entry.sample}", entry, run.table(trace), trace.tokens["id"]))
    return shown


def example_answers(traces: Sequence[Trace], tables: Sequence[TokenTable]) -> list[Answer]:
    """The recorded group that the page opens on."""
    return [
        Answer(Place(example=i), f"answer {i + 1}", entry_of(trace, 0, i), table, trace.tokens["id"])
        for i, (trace, table) in enumerate(zip(traces, tables, strict=True))
    ]


def prompt_table(run: str, iteration: int, entries: Sequence[Entry]) -> str:
    """A table of an iteration's prompts, which the page's script sorts, filters and searches. run: its name."""
    groups = groups_of(entries)
    if not groups:
        return markup.note("No completion of this iteration was recorded.")
    found = dict.fromkeys(name for group in groups for name in group.rewards)
    rewards = {name: name if name == "reward" else visible(name, 40) for name in found}
    outcomes = sorted({entry.outcome for entry in entries})
    numbers = ["right", *rewards.values(), "entropy, nats", "length, tokens"]
    head = ["prompt", "stage", *numbers, "outcomes", "recorded"]
    top = "".join(
        f'<th class="{"n" if name in (*numbers, "recorded") else ""}" aria-sort="none">'
        f'<button type="button" class="hapo-sort">'
        f"{html.escape(name)}</button></th>"
        for name in head
    )
    rows = "".join(_prompt_row(run, iteration, group, list(rewards)) for group in groups)
    options = "".join(f"<option>{html.escape(outcome)}</option>" for outcome in outcomes)
    inner = (
        f'<div class="hapo-bar"><label>Search <input type="search" class="hapo-search" placeholder="text or id">'
        f'</label><label>Outcome <select class="hapo-filter"><option value="">any</option>{options}</select></label>'
        f'<label>Groups <select class="hapo-mix"><option value="">all</option><option value="mixed">right and wrong'
        f'</option><option value="equal">all alike</option></select></label>'
        f'<span class="hapo-count" role="status"></span>{markup.export_buttons()}</div>'
        f'<div class="hapo-scroll hapo-tall"><table class="hapo-table hapo-sortable"><caption class="hapo-hidden">'
        f"Prompts of iteration {iteration}</caption><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    key = markup.content_key(inner)
    return f'<section class="hapo-list hapo-prompts" data-name="prompts" data-key="{key}">{inner}</section>'


def _prompt_row(run: str, iteration: int, group: Group, rewards: Sequence[str]) -> str:
    """A row of the table. rewards: the names of the columns with means of rewards."""
    place = Place(run, iteration, group.stage, group.prompt)
    question = visible(group.entries[0].question or group.prompt, 90)
    share = group.correct / group.size
    found = group.rewards
    numbers = [found.get(name) for name in rewards] + [group.entropy, group.length]
    cells = "".join(
        f'<td class="n" data-v="{value!r}">{show_number(value)}</td>' if value is not None else '<td class="n"></td>'
        for value in numbers
    )
    marks = "".join(
        f'<span class="hapo-outcome">{_mark(name)}{html.escape(name[:40])}</span>' for name in group.outcomes
    )
    words = f"{group.entries[0].question} {group.prompt}".lower()
    mix = "equal" if group.correct in (0, group.size) else "mixed"
    return (
        f'<tr data-words="{html.escape(words)}" data-mix="{mix}" '
        f'data-outcomes="{html.escape(json.dumps(group.outcomes))}">'
        f'<td title="{html.escape(group.prompt[:200])}"><a href="{html.escape(place.address)}"><bdi>'
        f"{html.escape(question)}</bdi></a></td><td>{html.escape(group.stage[:20])}</td>"
        f'<td class="n" data-v="{share!r}"><span class="hapo-share" style="--share:{share:.4f}"></span>'
        f"{group.correct} of {group.size}</td>{cells}<td>{marks}</td>"
        f'<td class="n" data-v="{len(group.entries)}">{len(group.entries)}</td></tr>'
    )


def group_page(shown: Sequence[Answer], group: Group, chosen: int | None = None) -> str:
    """A group's completions, marked where they part. chosen: the place in `shown` of the one that is opened beside it.

    They stand one below the other if they are short, else in columns.
    """
    tree = prefix_tree([answer.ids for answer in shown])
    span = span_of([v for answer in shown for v in answer.table.numbers["entropy"]], QUANTITIES["entropy"])
    short = mean([answer.entry.length for answer in shown]) <= SHORT
    items = "".join(_answer(shown[i], tree.branches[i], span, i == chosen, short) for i in tree.order)
    more = len(group.entries) - len(shown)
    below = markup.note(f"and {more:,} more") if more > 0 else ""
    marks = '<span class="hapo-key"><i class="fork"></i> parts from another</span>'
    marks += '<span class="hapo-key"><i class="alone"></i> from here on alone</span>'
    inner = (
        f'<div class="hapo-bar">{markup.entropy_legend(span)}{marks}{markup.export_buttons()}</div>'
        f'<div class="hapo-answers{" hapo-rows" if short else ""}">{items}</div>'
    )
    key = markup.content_key(inner)
    return f'<section class="hapo-list hapo-group" data-name="group" data-key="{key}">{inner}</section>{below}'


def _answer(answer: Answer, branch: Branch, span: tuple[float, float], chosen: bool, short: bool) -> str:
    """One completion of a group: its name, which is a link to its tokens, its outcome, and its tokens."""
    entry = answer.entry
    start = 0 if short or entry.length <= MOST_TOKENS else max(0, (branch.alone or 0) - BEFORE_PARTING)
    stop = start + MOST_TOKENS
    marks = dict.fromkeys(range(branch.shared if short else 0), "shared") | dict.fromkeys(branch.forks, "fork")
    if branch.alone is not None:
        marks[branch.alone] = "alone"
    body = markup.small_text(answer.table, span, marks, range(start, stop))
    left_out = entry.length - len(range(start, min(stop, entry.length)))
    facts = [counted(entry.length, "token"), f"reward {show_number(entry.reward)}"]
    facts += [f"{visible(name, 40)} {show_number(value)}" for name, value in entry.rewards.items()]
    if "advantage" in answer.table.numbers:
        facts.append(f"A {answer.table.numbers['advantage'][0]:.3g}".replace("-", "−"))
    if branch.shared == entry.length:
        facts.append("as above")
    if left_out:
        facts.append(f"{counted(left_out, 'token')} not shown here")
    current = ' aria-current="true"' if chosen else ""
    return (
        f'<article class="hapo-card hapo-answer"{current}><header><a href="{html.escape(answer.place.address)}">'
        f"{_mark(entry.outcome)}{html.escape(answer.title)}</a> "
        f'<b class="hapo-chip">{html.escape(entry.outcome[:40])}</b>'
        f'<span class="hapo-facts">{html.escape(" · ".join(facts))}</span></header>{body}</article>'
    )


def group_facts(group: Group, shown: Sequence[Answer], messages: Sequence[tuple[str, str]], gold: str) -> str:
    """The prompt of a group, its facts, and the sentence that says how to read its page."""
    facts = [f"{group.correct} of {group.size} right"]
    facts += [f"mean {visible(name, 40)} {show_number(value)}" for name, value in group.rewards.items()]
    facts += [f"mean entropy {show_number(group.entropy)} nats", f"mean length {show_number(group.length)} tokens"]
    if gold:
        facts.append(f"gold answer {visible(gold, 80)}")
    recorded = len(group.entries)
    sentence = "All of the group is recorded. " if group.known and group.size == recorded else ""
    if group.known and group.size > recorded:
        sentence = (
            f"{recorded} of its {group.size} completions are recorded; logging.traces_per_iteration records more. "
        )
    first = min((b for b in prefix_tree([a.ids for a in shown]).branches if b.forks), key=_first_fork, default=None)
    where = f"They first part at token {first.forks[0]}. " if first else ""
    reading = f"{sentence}{where}A bar stands where a completion parts from the others; open one for its numbers."
    parts = f"{markup.messages(messages)}<div>{markup.chips(facts)}</div>{markup.note(reading, 'reading')}"
    return f'<div class="hapo-summary">{parts}</div>'


def _first_fork(branch: Branch) -> int:
    return branch.forks[0]


def crumbs(place: Place, names: Sequence[tuple[str, Place]], beside: Sequence[tuple[str, Place]], push: bool) -> str:
    """The path to a view as links. beside: links to the views before and after it.

    The page's script puts the address of `place` into the browser's. push: as a new entry of its history.
    """
    links = [f'<a href="{html.escape(where.address)}"><bdi>{html.escape(name)}</bdi></a>' for name, where in names[:-1]]
    links += [f'<b aria-current="page"><bdi>{html.escape(name)}</bdi></b>' for name, _ in names[-1:]]
    others = "".join(f'<a href="{html.escape(where.address)}">{html.escape(name)}</a>' for name, where in beside)
    history = "push" if push else "replace"
    inner = f'{" <i>›</i> ".join(links)}<span class="hapo-beside">{others}</span>'
    key = markup.content_key(f"{place.address} {inner}")
    return (
        f'<nav class="hapo-crumbs" aria-label="Place" data-address="{html.escape(place.address)}" '
        f'data-history="{history}" data-key="{key}">{inner}</nav>'
    )


def _mark(outcome: str) -> str:
    """A sign for an outcome that tells right from wrong without colour."""
    sign = {"correct": "✓", "wrong": "✗"}.get(outcome, "–")
    kind = {"correct": "right", "wrong": "wrong"}.get(outcome, "other")
    return f'<i class="hapo-sign {kind}" aria-hidden="true">{sign}</i>'
