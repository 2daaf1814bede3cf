"""Ctrl-C and SIGTERM as an exception that is raised only where the run's state is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""The signals that ask a run to stop."""


class Interrupted(BaseException):
    """The user or the system asked the run to stop. number: the signal.

    Like KeyboardInterrupt, it is not an Exception, so that handlers of errors let it pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """A context that delays SIGINT and SIGTERM to its end, for library code that an exception would leave half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for raised in received:
            signal.raise_signal(raised)


class Interrupts:
    """Within `listening()`, SIGINT and SIGTERM raise Interrupted, except between `shield` and `unshield`.

    Between those two calls the signal is only noted in `pending`. A second signal ends the program at once. deferred:
    signals are always only noted, since several processes must agree on where they stop. shielded: whether the run is
    between the two calls, where its state is not whole.
    """

    def __init__(self, deferred: bool = False) -> None:
        self.deferred = deferred
        self.pending: int | None = None
        self.shielded = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the signals are handled."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only.
            return
        before = {number: signal.signal(number, self._receive) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def shield(self) -> None:
        """Only note signals from here on, since the run's state is not whole."""
        self.shielded = True

    def unshield(self) -> None:
        """Let signals raise Interrupted again."""
        self.shielded = False

    def _receive(self, number: int, frame: object) -> None:
        if self.pending is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.pending = number
        if not self.shielded and not self.deferred:
            raise Interrupted(number)
