"""Ctrl-C and SIGTERM as an exception that is raised only where the run's state is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(BaseException):
    """The user or the system asked the run to stop. number: the signal.

    Like KeyboardInterrupt no Exception, so that whoever turns those into sentences lets it pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end: for code of others that an exception would leave in pieces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {n: signal.signal(n, lambda n, frame: received.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


class Interrupts:
    """Within `listening()`, SIGINT and SIGTERM raise Interrupted, except between `shield` and `unshield`.

    There, and always with `deferred` (several processes must agree on where they stop), the signal is only noted in
    `pending`. A second signal ends the program at once.
    """

    def __init__(self, deferred: bool = False) -> None:
        self.deferred = deferred
        self.pending: int | None = None
        self._shielded = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only.
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def shield(self) -> None:
        self._shielded = True

    def unshield(self) -> None:
        self._shielded = False

    def _receive(self, number: int, frame: object) -> None:
        if self.pending is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.pending = number
        if not self._shielded and not self.deferred:
            raise Interrupted(number)
