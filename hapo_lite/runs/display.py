"""The progress line: one line that says what a run is doing, which a thread keeps up to date.

On a terminal the line overwrites itself, and the bar of iterations is part of it. A second line is not possible, since
the output of a notebook's cell cannot move its cursor up. Elsewhere a plain line is printed once a minute. The same
progress goes into status.json.
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
"""Seconds that a stage has to last before the first plain line, so that a short run prints none."""
KNOWN_S = 10.0
"""Seconds of writing before an estimate is announced. Three times as long while no completion has finished."""
WORTH_SAYING_S = 60.0
"""Seconds that the writing has to take for its length to be announced."""
LEAVING_S = 2.0
"""Seconds to wait for the thread at the end. A terminal that accepts no output may block the thread for longer."""
STAGE_LINE = "{desc}"
"""The line without a bar of iterations. tqdm cuts it to the width of the terminal."""
BAR_LINE = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {desc}{postfix} |{bar}|"
"""The bar of iterations on a terminal. The most important part comes first, as a narrow terminal cuts the end off."""


class Display:
    """A context that shows `progress`, and writes it to `status`.

    main: whether this is the process that prints; the other processes print nothing. shown: whether the main process
    shows the progress too.
    """

    def __init__(self, progress: Progress, status: Status, main: bool, shown: bool) -> None:
        self.progress = progress
        self.status = status
        self.main = main
        self.shown = main and shown
        self.terminal = self.shown and sys.stderr.isatty()
        self._line: tqdm | None = None
        self._bar: tqdm | None = None
        self._announcement = ""
        self._last: float | None = None
        self._began = progress.clock()
        # The lock is reentrant for the reason that status.py gives.
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
        """A context with a bar of `total` units, of which `done` are done already. options: further arguments of tqdm.

        On a terminal the bar shows the stage too.
        """
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
        """Print `sentence` above the line. It is flushed, since someone may read the output from a file meanwhile."""
        if self.main:
            tqdm.write(sentence)
            sys.stdout.flush()

    @contextlib.contextmanager
    def announcing(self, what: str) -> Iterator[None]:
        """A context that prints `what` once the time for writing completions is known, if the time is long.

        what: a sentence with {} for the time.
        """
        self._announcement = what
        try:
            yield
        finally:
            self._announcement = ""

    def tick(self) -> None:
        """Read the progress once, note it in status.json, and show it if that is due."""
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
        """Whether a plain line is due: once a minute, and once a stage has lasted FIRST_S before the first line."""
        now = self.progress.clock()
        if self._last is None:
            return now - self.progress.since >= FIRST_S or now - self._began >= INTERVAL_S
        return now - self._last >= INTERVAL_S

    def _announce(self, numbers: Numbers | None) -> None:
        """Print the announcement once, as soon as the time is known and long enough."""
        writing = self.progress.work
        if not self._announcement or not isinstance(writing, Writing):
            return
        if numbers is None or numbers.seconds_left is None:
            return
        spent = self.progress.clock() - writing.began
        total = spent + numbers.seconds_left
        known_after = 3 * KNOWN_S if numbers.at_most else KNOWN_S
        if total < WORTH_SAYING_S or spent < known_after:
            return
        announcement = self._announcement
        self._announcement = ""
        self.say(announcement.format(f"{'at most' if numbers.at_most else 'about'} {in_words(total)}"))

    def _draw(self, text: str) -> None:
        with self._lock:
            line = self._line if self._bar is None else self._bar
            if line is None:
                line = tqdm(bar_format=STAGE_LINE, dynamic_ncols=True, leave=False)
                self._line = line
            line.set_description_str(text)

    def _close_line(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _watch(self) -> None:
        while not self._over.wait(TICK_S):
            # A run goes on when its terminal has gone away.
            with contextlib.suppress(OSError, ValueError):
                self.tick()
