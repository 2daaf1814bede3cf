"""A generation as the page follows it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from hapo_lite.inspect.generate import GenerationSettings, Progress, generate
from hapo_lite.inspect.tabs.desk import Session
from hapo_lite.inspect.tokens import TokenTable, token_table
from hapo_lite.model.policy import Policy


def write(policy: Policy, settings: GenerationSettings, session: Session) -> Iterator[tuple[Progress, TokenTable, str]]:
    """(progress, its tokens, "") whenever the page is to be drawn anew; the last item says why it ended."""
    due = 0.0
    for progress in generate(policy, settings):
        ended = "cancelled" if session.cancel else progress.ended
        if not ended and time.monotonic() < due:
            continue
        table = token_table(progress.trace, settings.method, settings.temperature, policy.tokenizer)
        yield progress, table, ended
        if ended:
            return
        # Every drawing sends the whole text, so long ones are drawn less often.
        due = time.monotonic() + 0.08 + 0.0004 * len(table)
