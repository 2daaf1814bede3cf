"""Views for the output of a notebook. Each is a page in a frame that holds its style and script and needs no server."""

from __future__ import annotations

import html
from collections.abc import Sequence

from hapo_lite.errors import UserError
from hapo_lite.inspect import assets, markup, views
from hapo_lite.inspect.runs import Entry, Run


def completion(run: Run, iteration: int | None = None, place: int = 0, height: int = 420) -> str:
    """One recorded completion token by token. A reader points at a token for its numbers.

    iteration: None for the last one. place: the number of the completion in its iteration. height: that of the frame,
    pixels. Raises UserError if there is no such completion.
    """
    entries = entries_of(run, iteration)
    if not 0 <= place < len(entries):
        raise UserError(f"iteration {entries[0].iteration} has completions 0 to {len(entries) - 1}, not {place}")
    entry = entries[place]
    trace = run.trace_of(entry)
    table = run.table(trace)
    return frame(markup.summary(trace, table) + markup.token_text(table), height)


def right_against_wrong(run: Run, iteration: int | None = None, height: int = 420) -> str:
    """An iteration's right completions beside its other ones, coloured by entropy on one scale."""
    right, wrong = views.right_against_wrong(run, entries_of(run, iteration))
    return frame(f'<div style="display:flex;gap:20px"><div>{right}</div><div>{wrong}</div></div>', height)


def entries_of(run: Run, iteration: int | None) -> Sequence[Entry]:
    """The completions of an iteration. iteration: None for the last one. Raises UserError if none was recorded."""
    iterations = run.iterations()
    chosen = iteration if iteration is not None or not iterations else iterations[-1]
    entries = run.entries(chosen)[0] if chosen in iterations else []
    if not entries:
        named = f"iterations {', '.join(map(str, iterations))} have some" if iterations else "no iteration has any"
        which = "" if chosen is None else f" of iteration {chosen}"
        raise UserError(f"{run.path} has no recorded completions{which}: {named}")
    return entries


def frame(body: str, height: int) -> str:
    """The HTML in a frame, so its style and that of the notebook do not mix. height: pixels.

    The sandbox lets the page run its script and save a picture, and nothing else.
    """
    page = (
        f'<!doctype html><meta charset="utf-8"><style>{assets.style()}'
        f'</style><body style="margin:8px;font-family:system-ui,sans-serif">{body}'
        f"<script>{assets.script()}</script></body>"
    )
    return (
        f'<div><iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'style="width:100%;height:{height}px;border:0"></iframe></div>'
    )
