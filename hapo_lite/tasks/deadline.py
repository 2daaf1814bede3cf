"""Calls that must end in time: a function in a thread of its own, or several coroutines together.

Python cannot stop a thread. A call that is late goes on in a daemon thread, which ends with the program.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

GRACE_S = 2.0
"""Seconds after the last deadline at which coroutines are given up that do not yield to the event loop."""


THEIRS = (Exception, SystemExit, asyncio.CancelledError)
"""What a user's function may raise that counts as its fault. Ctrl-C does not: it may come at any time."""


class Overdue(Exception):
    """A call did not end before its deadline."""


def call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """The result of `function`. Raises whatever it raises, SystemExit too, and Overdue after `seconds`."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(function())
        except THEIRS as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    concurrent.futures.wait([future], timeout=seconds)
    if not future.done():
        raise Overdue
    return future.result()


@dataclass(frozen=True)
class Outcome:
    """The result of a coroutine, or what it raised; Overdue if it did not end in time."""

    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Awaited:
    """A coroutine function without arguments, and its deadline in seconds."""

    start: Callable[[], Coroutine[Any, Any, Any]]
    seconds: float


class EventLoop:
    """An event loop in a daemon thread, started when first needed.

    One loop serves all calls, because the clients that coroutines keep between calls belong to the loop of the first.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def gather(self, calls: Sequence[Awaited]) -> list[Outcome]:
        """Await all calls together: one outcome for each, in order."""
        outcomes = [Outcome(error=Overdue())] * len(calls)

        async def one(place: int) -> None:
            outcomes[place] = await _outcome(calls[place])

        async def everything() -> None:
            await asyncio.gather(*(one(place) for place in range(len(calls))))

        future = asyncio.run_coroutine_threadsafe(everything(), self._running())
        try:
            concurrent.futures.wait([future], timeout=max(call.seconds for call in calls) + GRACE_S)
        finally:
            future.cancel()
        return outcomes

    def close(self) -> None:
        """End the loop."""
        if self._loop is not None:
            # A late coroutine was reported; the loop need not complain that it is dropped.
            self._loop.set_exception_handler(lambda loop, context: None)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self._loop


async def _outcome(call: Awaited) -> Outcome:
    """What a call came to. SystemExit is among it, as it would end the event loop, and a cancellation of its own."""
    try:
        async with asyncio.timeout(call.seconds) as deadline:
            return Outcome(await call.start())
    except THEIRS as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # From outside: all calls are given up.
        return Outcome(error=Overdue() if deadline.expired() else error)
