"""HTML of a fork: one row a branch, one square a continuation, and the measured credit beside HAPO's.

Every piece of text from a model passes through `html.escape`, as in `markup`.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hapo_lite.inspect.fork import Branch, Continuation, Fork
from hapo_lite.inspect.markup import note
from hapo_lite.inspect.tokens import show_number, visible
from hapo_lite.train.intervals import Interval

CONTEXT = 240
"""Characters before the fork that are shown."""
WORTH_NAMING = 0.01
"""The probability from which an alternative may stand in the sentence at the top."""
MOST_TEXTS, MOST_ANSWERS = 12, 3
KINDS = {"right": "right", "wrong": "wrong", "none": "no answer", "open": "not graded"}
"""By the class of a square, what it stands for."""


@dataclass(frozen=True)
class Given:
    """HAPO's credit for the token at the fork.

    weight: what redistribution multiplies the completion's advantage with. right: whether the completion is right; None
    if it is not graded.
    """

    weight: float
    right: bool | None


def fork_html(fork: Fork, given: Given) -> str:
    """The whole fork. It may be still under way."""
    parts = [_said(fork), _lead(fork), _rows(fork)]
    if fork.measured and fork.ended:
        parts.append(_credit(fork, given))
    parts += [_legend(fork), _texts(fork)]
    return f'<section class="hapo-fork" aria-label="Fork at token {fork.settings.position}">{"".join(parts)}</section>'


def _said(fork: Fork) -> str:
    """The text before the fork, and the token that the completion has there."""
    before = fork.before[-CONTEXT:]
    cut = "…" if len(fork.before) > CONTEXT else ""
    return (
        f'<p class="hapo-fork-said" dir="auto">{cut}{html.escape(visible(before, CONTEXT) if before else "")}'
        f"<mark>{_token(fork.sampled)}</mark></p>"
    )


def _lead(fork: Fork) -> str:
    """The sentence at the top: what follows the token, and what would have followed another one."""
    if not fork.measured:
        return ""
    said = fork.sampled
    other = max(fork.branches[1:], key=lambda branch: _distance(branch, said), default=None)
    sentence = f"After {_quoted(said)}, as it said: <b>{_count(said)}</b>."
    if other is not None:
        sentence += f" Had it said {_quoted(other)}: <b>{_count(other)}</b>."
    return f'<p class="hapo-fork-lead" role="status">{sentence}</p>'


def _distance(branch: Branch, said: Branch) -> tuple[bool, float]:
    """What the sentence prefers: an alternative that is not too rare, and whose share is far from the sampled one's."""
    if branch.share is None or said.share is None:
        return False, 0.0
    return branch.probability >= WORTH_NAMING, abs(branch.share.value - said.share.value)


def _count(branch: Branch) -> str:
    if branch.ends:
        return "the answer ends, right" if branch.right else "the answer ends, not right"
    return f"{branch.right} of {len(branch.continuations)} right"


def _rows(fork: Fork) -> str:
    """A table with a row for each branch."""
    head = ["Next token", "Probability", "Continuations"]
    head += ["Right, 95 % interval", "Against what it said, points"] if fork.graded else ["Answers"]
    top = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join(_row(fork, branch) for branch in fork.branches)
    return f'<table class="hapo-forks"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _row(fork: Fork, branch: Branch) -> str:
    said = '<small class="hapo-chip">as it said</small>' if branch.sampled else ""
    percent = _percent(branch.probability)
    cells = [
        f'<th scope="row">{_token(branch)} {said}</th>',
        f'<td class="p"><i style="width:{100.0 * branch.probability:.1f}%"></i>{percent}</td>',
        f'<td class="all">{_squares(fork, branch)}</td>',
    ]
    if not fork.graded:
        cells.append(f'<td class="answers">{_answers(branch.continuations)}</td>')
    elif branch.share is None:
        cells += ['<td class="share"></td>', '<td class="against"></td>']
    else:
        cells.append(f'<td class="share"><b>{_count(branch)}</b>{_plot(fork, branch.share)}</td>')
        against = "" if branch.sampled or not fork.measured else _points(fork.against_sampled(branch))
        cells.append(f'<td class="against">{against}</td>')
    return f"<tr{' class=said' if branch.sampled else ''}>{''.join(cells)}</tr>"


def _squares(fork: Fork, branch: Branch) -> str:
    """One square for each continuation, right ones first, and an empty one for each that is still awaited."""
    if branch.ends:
        return '<span class="hapo-note">nothing follows</span>'
    order = list(KINDS)
    written = sorted(branch.continuations, key=lambda c: order.index(_kind(c)))
    squares = "".join(f'<i class="{_kind(c)}" title="{html.escape(_tail(c))}"></i>' for c in written)
    missing = fork.settings.continuations - len(written)
    squares += '<i class="due"></i>' * (0 if fork.ended else missing)
    kinds = Counter(_kind(c) for c in written)
    words = ", ".join(f"{count} {KINDS[kind]}" for kind, count in kinds.items()) or "none yet"
    return f'<span class="hapo-squares" role="img" aria-label="{words}">{squares}</span>'


def _kind(continuation: Continuation) -> str:
    """The class of a continuation's square, a key of KINDS."""
    if continuation.outcome == "":
        return "open"
    if continuation.outcome in ("correct", "wrong"):
        return "right" if continuation.outcome == "correct" else "wrong"
    return "none"


def _plot(fork: Fork, share: Interval) -> str:
    """A share on a scale from 0 to 1, its interval as a line, and V(s) as a mark that all rows have in one place."""
    value = f'<u style="left:{100.0 * fork.value.value:.2f}%"></u>' if fork.measured else ""
    words = f"{_percent(share.value)} right, 95 % interval {_percent(share.low)} to {_percent(share.high)}"
    return (
        f'<span class="hapo-track" role="img" aria-label="{words}" title="{words}">{value}'
        f'<i style="left:{100.0 * share.low:.2f}%;width:{100.0 * (share.high - share.low):.2f}%"></i>'
        f'<b style="left:{100.0 * share.value:.2f}%"></b></span>'
    )


def _answers(continuations: Sequence[Continuation]) -> str:
    """The most frequent answers with their counts."""
    found = Counter(c.answer for c in continuations if c.answer is not None)
    shown = [f"{html.escape(visible(answer, 30))} ×{count}" for answer, count in found.most_common(MOST_ANSWERS)]
    none = sum(c.answer is None for c in continuations)
    more = len(found) - len(shown)
    shown += [f"{more} more"] if more else []
    shown += [f"none ×{none}"] if none else []
    return ", ".join(shown)


def _credit(fork: Fork, given: Given) -> str:
    """The measured credit of the sampled token beside what HAPO gives it."""
    credit, value = fork.credit(fork.sampled), fork.value
    share = fork.sampled.share
    here = _percent(share.value) if share else ""
    rows = _scale("Measured", credit, 1.0, f"{_points(credit)}, in points")
    if given.right is None:
        hapo = f"{show_number(given.weight)} × A"
        explained = "A is the completion's advantage, which is not known without its grade."
    else:
        signed = given.weight if given.right else -given.weight
        hapo = f"{show_number(signed)}"
        rows += _scale("HAPO", Interval(signed, signed, signed), 2.0, hapo)
        sign = "1, since this completion is right" if given.right else "−1, since this completion is not right"
        explained = f"{show_number(given.weight)} x A, with A = {sign} (Eq. 10-11 at ratio 1; GRPO and DAPO give A)."
    untried = _percent(fork.untried)
    return (
        f'<div class="hapo-fork-credit"><h3 class="hapo-h">Credit of {_quoted(fork.sampled)}</h3>'
        f'<div class="hapo-scales">{rows}</div>'
        f"<p>{html.escape(_verdict(credit, given))}</p>"
        f'<p class="hapo-note">Measured: Q(s, a) − V(s), the share right after this token ({here}) less the mean over '
        f"the tokens by their probability ({_percent(value.value)}, 95 %: {_percent(value.low)} to "
        f"{_percent(value.high)}). Tokens that were not tried have {untried} in all; the intervals allow for anything "
        f"that may follow them. HAPO: {explained}</p></div>"
    )


def _verdict(credit: Interval, given: Given) -> str:
    """Whether the measured credit and HAPO's point the same way."""
    if not credit.excludes_zero:
        return "The measured interval holds 0: these continuations do not tell whether the token helped."
    measured = "raised" if credit.above_zero else "lowered"
    sentence = f"This token {measured} the chance of a right answer"
    if given.right is None:
        return f"{sentence}."
    if given.right == credit.above_zero:
        return f"{sentence}, and HAPO's credit has the same sign."
    return f"{sentence}, and HAPO's credit has the other sign: it shares the outcome of the whole completion."


def _scale(name: str, interval: Interval, end: float, words: str) -> str:
    """A number with its interval on a scale from -end to end."""

    def place(value: float) -> float:
        return 50.0 + 50.0 * min(max(value / end, -1.0), 1.0)

    low, high, value = place(interval.low), place(interval.high), place(interval.value)
    bar = min(50.0, value), abs(value - 50.0)
    limit = show_number(end)
    return (
        f'<span>{name}</span><span class="hapo-credit" role="img" aria-label="{name}: {html.escape(words)}">'
        f'<s style="left:{bar[0]:.2f}%;width:{bar[1]:.2f}%"></s>'
        f'<i style="left:{low:.2f}%;width:{high - low:.2f}%"></i><em>−{limit}</em><em>0</em><em>{limit}</em></span>'
        f"<b>{words}</b>"
    )


def _legend(fork: Fork) -> str:
    kinds = [kind for kind in KINDS if (kind == "open") != fork.graded]
    squares = " ".join(f'<span class="hapo-squares"><i class="{kind}"></i></span> {KINDS[kind]}' for kind in kinds)
    mark = '<span class="hapo-key-value"></span> V(s), the mean over all tokens' if fork.measured else ""
    state = "" if fork.ended else "Shares are provisional while continuations are written: short ones end first."
    return f'<div class="hapo-bar hapo-fork-legend">{squares} {mark}<span>{html.escape(state)}</span></div>'


def _texts(fork: Fork) -> str:
    """The continuations, folded. They are left out while more arrive, since a drawing would fold them again."""
    if not fork.ended:
        return ""
    lists = "".join(
        f"<h4>{_token(branch)}</h4><ol>{''.join(_text(c) for c in branch.continuations[:MOST_TEXTS])}</ol>"
        for branch in fork.branches
    )
    return f"<details><summary>Read the continuations</summary>{lists}</details>"


def _text(continuation: Continuation) -> str:
    cut = " (cut off)" if continuation.truncated else ""
    return (
        f'<li><span class="hapo-squares"><i class="{_kind(continuation)}"></i></span> '
        f"<bdi>{html.escape(visible(continuation.text, 600))}</bdi>{cut}</li>"
    )


def _tail(continuation: Continuation) -> str:
    """The end of a continuation, for a square's tip."""
    return visible(continuation.text[-160:], 160)


def _token(branch: Branch) -> str:
    return f'<bdi class="hapo-fork-token">{html.escape(visible(branch.text, 40).strip(chr(10)))}</bdi>'


def _quoted(branch: Branch) -> str:
    return f"<q>{_token(branch)}</q>"


def _points(interval: Interval) -> str:
    """A difference of shares in percentage points, with its interval."""

    def signed(value: float) -> str:
        return f"{100.0 * value:+.0f}".replace("-", "−") if round(100.0 * value) else "0"

    return f"{signed(interval.value)} ({signed(interval.low)} to {signed(interval.high)})"


def _percent(share: float) -> str:
    percent = 100.0 * share
    if 0.0 < percent < 0.01:
        return "under 0.01 %"
    return f"{percent:.0f} %" if percent >= 9.5 else f"{percent:.2g} %"


def status(fork: Fork, seconds: float) -> str:
    """A sentence on how far the fork is, as a note."""
    due = fork.settings.continuations * sum(not branch.ends for branch in fork.branches)
    done = sum(len(branch.continuations) for branch in fork.branches if not branch.ends)
    so_far = f"{done} of {due} continuations in {seconds:.1f} s"
    return note(f"{so_far}{'' if not fork.ended or fork.ended == 'whole' else f'; {fork.ended}'}.")
