"""Signs of life: one line that says what a run is doing, kept up to date by a thread of its own.

On a terminal the line overwrites itself, and the bar of iterations is part of it: one line and not two, since the
output of a notebook's cell cannot move its cursor up. Elsewhere it is a plain line once a minute. status.json is told
the same.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from hapo_lite.runs.progress import Numbers, Progress, Writing, in_words
from hapo_lite.runs.status import Status

TICK_S = 1.0
"""Seconds between two looks at the numbers."""
INTERVAL_S = 60.0
"""Seconds between two plain lines."""
FIRST_S = 10.0
"""Seconds that a stage has to last before the first plain line: a short run prints none."""
KNOWN_S = 10.0
"""Seconds of writing from which an estimate is announced, if a completion has finished; without one, three times it."""
WORTH_SAYING_S = 60.0
"""Seconds that something has to take for its length to be announced."""
LEAVING_S = 2.0
"""Seconds to wait for the thread at the end. A terminal that takes no output may hold it up longer."""
STAGE_LINE = "{desc}"
"""The line where there is no bar of iterations. tqdm cuts it to the width of the terminal."""
BAR_LINE = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}{postfix} |{bar}|"
"""The bar of iterations on a terminal: what is cut off last comes first."""


class Display:
    """Shows `progress` from entering the context to its end, and notes it in `status`.

    main: whether this is the process that prints; the others print nothing. shown: whether it shows the progress too.
    """

    def __init__(self, progress: Progress, status: Status, main: bool, shown: bool) -> None:
        self.progress, self.status, self.main = progress, status, main
        self.shown = shown = main and shown
        self.terminal = shown and sys.stderr.isatty()
        self._line: tqdm | None = None
        self._bar: tqdm | None = None
        self._announcement = ""
        self._last: float | None = None
        self._began = progress.clock()
        # Reentrant for the reason that status.py gives.
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="display")

    def __enter__(self) -> Display:
        if self.main:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(LEAVING_S)
        with self._lock:
            self._close_line()

    @contextlib.contextmanager
    def bar(self, total: int, done: int, unit: str, **options: Any) -> Iterator[tqdm]:
        """A bar of `total` units, of which `done` are there already. On a terminal the stage is a part of its line."""
        look = {"bar_format": BAR_LINE, "dynamic_ncols": True} if self.terminal else {}
        with self._lock:
            self._close_line()
            bar = tqdm(total=total, initial=done, unit=unit, disable=not self.shown, **look, **options)
            self._bar = bar
        try:
            yield bar
        finally:
            with self._lock:
                self._bar = None
                if self.terminal:
                    bar.bar_format = None
                    bar.set_description_str("", refresh=False)
                bar.close()

    def say(self, sentence: str) -> None:
        """Print `sentence` above the line. It is flushed, since it may be read from a file while the run goes on."""
        if self.main:
            tqdm.write(sentence)
            sys.stdout.flush()

    @contextlib.contextmanager
    def announcing(self, what: str) -> Iterator[None]:
        """While it lasts: once it is known how long the writing takes, and if that is long, print `what`.

        what: has {} where the time goes.
        """
        self._announcement = what
        try:
            yield
        finally:
            self._announcement = ""

    def tick(self) -> None:
        """Look at the numbers once, and show what is due."""
        stage, numbers = self.progress.stage, self.progress.numbers()
        self.status.note(stage, self.progress.about, numbers)
        if not self.shown:
            return
        self._announce(numbers)
        if self.terminal:
            self._draw(str(self.progress))
        elif self._due():
            self._last = self.progress.clock()
            iteration = self.status.doing.iteration
            where = f"iteration {iteration}, " if iteration else ""
            tqdm.write(f"{where}{self.progress}", file=sys.stderr)

    def _due(self) -> bool:
        """Whether a plain line is due: once a minute, and the first in a stage that lasts."""
        now = self.progress.clock()
        if self._last is None and now - self.progress.since >= FIRST_S:
            return True
        return now - (self._began if self._last is None else self._last) >= INTERVAL_S

    def _announce(self, numbers: Numbers | None) -> None:
        writing = self.progress.work
        if not (self._announcement and isinstance(writing, Writing) and numbers and numbers.seconds_left is not None):
            return
        spent = self.progress.clock() - writing.began
        total = spent + numbers.seconds_left
        if total < WORTH_SAYING_S or spent < (3 * KNOWN_S if numbers.at_most else KNOWN_S):
            return
        announcement, self._announcement = self._announcement, ""
        self.say(announcement.format(f"{'at most' if numbers.at_most else 'about'} {in_words(total)}"))

    def _draw(self, text: str) -> None:
        with self._lock:
            if self._bar is None and self._line is None:
                self._line = tqdm(bar_format=STAGE_LINE, dynamic_ncols=True, leave=False)
            line = self._bar or self._line
            line.set_description_str(text)

    def _close_line(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _watch(self) -> None:
        while not self._over.wait(TICK_S):
            # A terminal that has gone away is no reason to stop a run.
            with contextlib.suppress(OSError, ValueError):
                self.tick()
