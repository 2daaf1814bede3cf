"""A generation at the rate at which the page can show it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from hapo_lite.inspect.generate import GenerationSettings, generate
from hapo_lite.inspect.tabs.state import Session
from hapo_lite.inspect.tokens import TokenTable, token_table
from hapo_lite.model.policy import Policy
from hapo_lite.runs.trace import Trace


@dataclass(frozen=True)
class Snapshot:
    """A generation at the moment when the page draws it.

    first_pass: as in Progress. ended: a clause that says why the generation ended; "" while it runs.
    """

    trace: Trace
    table: TokenTable
    first_pass: bool
    ended: str


def snapshots(policy: Policy, settings: GenerationSettings, session: Session) -> Iterator[Snapshot]:
    """A snapshot whenever the page is to be drawn anew. The last one is the whole generation, or was cancelled."""
    due = 0.0
    for progress in generate(policy, settings):
        ended = "cancelled" if session.cancel else progress.ended
        if not ended and time.monotonic() < due:
            continue
        table = token_table(progress.trace, settings.method, settings.temperature, policy.tokenizer)
        yield Snapshot(progress.trace, table, progress.first_pass, ended)
        if ended:
            return
        # Every drawing sends the whole text, so a long text is drawn less often.
        due = time.monotonic() + 0.08 + 0.0004 * len(table)
