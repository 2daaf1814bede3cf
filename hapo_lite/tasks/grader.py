"""The grading processes. Plain cases are graded without one.

sympy can compute for minutes on a short expression, and only a process can be stopped reliably.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from hapo_lite.errors import UserError
from hapo_lite.tasks import answers
from hapo_lite.tasks.answers import Grade, Outcome

_STARTING_S = 120.0
_BACKSTOP_S = 5.0
"""Seconds after its deadline at which a grading process ends itself, if nobody has killed it."""

Request = dict[str, str]
"""A comparison for a grading process, without its deadline: see `_grader.judge`."""


class GraderPool:
    """Grading processes, started when first needed. Close it, or use it as a context manager.

    workers: most processes at once. timeout_s: deadline of one comparison, seconds; a process past its deadline is
    killed and replaced. Any thread may use the pool; calls take turns.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0) -> None:
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"workers and timeout_s must be positive, not {workers} and {timeout_s}")
        self._size = workers
        self._timeout_s = timeout_s
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def grade_many(
        self,
        pairs: Sequence[tuple[str, str]],
        timeout_s: float | None = None,
        graded: Callable[[int], None] = lambda count: None,
    ) -> list[Grade]:
        """Grades of (completion text, gold answer) pairs, in their order. Never raises because of what a text says.

        graded: called with the number of pairs that have got their grade since the last call. Raises UserError if the
        grading processes cannot be started, RuntimeError after `close`.
        """
        found: list[Grade | str] = []
        requests: dict[str, Request] = {}
        for text, gold in pairs:
            read = _read(text, gold)
            if isinstance(read, Grade):
                found.append(read)
                continue
            # Completions of one prompt often give the same answer: each distinct comparison is made once.
            key = json.dumps(read)
            requests[key] = read
            found.append(key)
        pairs_of = Counter(key for key in found if not isinstance(key, Grade))
        graded(len(found) - pairs_of.total())
        counts = [pairs_of[key] for key in requests]
        answers = self._compare(list(requests.values()), timeout_s or self._timeout_s, lambda i: graded(counts[i]))
        verdicts = dict(zip(requests, answers, strict=True))
        return [key if isinstance(key, Grade) else verdicts[key] for key in found]

    def _compare(self, requests: list[Request], timeout_s: float, graded: Callable[[int], None]) -> list[Grade]:
        if not requests:
            return []
        with self._lock:
            if self._closed:
                raise RuntimeError("this GraderPool is closed")
            return _Round(requests, timeout_s, self._size, self._idle, graded).run()

    def close(self) -> None:
        """End the grading processes."""
        with self._lock:
            self._closed = True
            while self._idle:
                self._idle.pop().close()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(text: str, gold: str) -> Grade | Request:
    """`answers.read`, with the outcome "error" where it raises: no completion may end a run."""
    try:
        return answers.read(text, gold)
    except Exception:
        return Grade(False, None, "error")


class _Worker:
    """One grading process. It writes a line when it is ready, then answers each line with a line."""

    def __init__(self) -> None:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # The order of sympy's terms, and with it now and then a verdict, depends on the hash seed.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hapo_lite.tasks._grader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        self.ready = False
        self._received = b""

    @property
    def stdout(self) -> IO[bytes]:
        return _piped(self.process.stdout)

    def send(self, request: Request, timeout_s: float) -> None:
        """Send a request. Raises OSError if the process has ended."""
        if self.process.poll() is not None:
            raise BrokenPipeError
        _piped(self.process.stdin).write(json.dumps(request | {"seconds": timeout_s + _BACKSTOP_S}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """The complete messages: a quick answer can come together with the first line. Raises EOFError at the end."""
        chunk = os.read(self.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        *lines, self._received = (self._received + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def complaint(self) -> str:
        """The last line that the process wrote to its standard error, after killing it."""
        self.process.kill()
        lines = _piped(self.process.stderr).read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with code {self.process.wait()}"

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError):
                _piped(pipe).close()


def _piped(stream: IO[bytes] | None) -> IO[bytes]:
    """The stream of a process that was started with a pipe for it."""
    assert stream is not None
    return stream


class _Round:
    """One call of grade_many: its waiting requests, busy workers and grades.

    size: most workers at once. idle: the pool's idle workers, taken from and given back. graded: called with the index
    of a request that has got its first grade.
    """

    def __init__(
        self,
        requests: list[Request],
        timeout_s: float,
        size: int,
        idle: list[_Worker],
        graded: Callable[[int], None],
    ) -> None:
        self._requests = requests
        self._timeout_s = timeout_s
        self._size = size
        self._idle = idle
        self._graded = graded
        self._selector = selectors.DefaultSelector()
        self._grades: dict[int, Grade] = {}
        self._waiting = deque(range(len(requests)))
        self._busy: dict[_Worker, tuple[int, float]] = {}
        self._retried: set[int] = set()

    def run(self) -> list[Grade]:
        """The grade of each request."""
        with self._selector:
            try:
                while self._waiting or self._busy:
                    while self._waiting and len(self._busy) < self._size:
                        self._start(self._waiting.popleft())
                    next_deadline = min(deadline for _, deadline in self._busy.values())
                    for key, _ in self._selector.select(max(0.0, next_deadline - time.monotonic())):
                        self._hear(key.data)
                    self._stop_the_late()
            finally:
                for worker in self._busy:
                    worker.close()
        return [self._grades[i] for i in range(len(self._requests))]

    def _start(self, index: int) -> None:
        request = self._requests[index]
        worker = self._send_to_idle(request)
        if worker is None:
            worker = _Worker()
            with suppress(OSError):
                worker.send(request, self._timeout_s)
        wait_s = self._timeout_s if worker.ready else _STARTING_S
        self._busy[worker] = index, time.monotonic() + wait_s
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _send_to_idle(self, request: Request) -> _Worker | None:
        while self._idle:
            worker = self._idle.pop()
            try:
                worker.send(request, self._timeout_s)
                return worker
            except OSError:
                worker.close()
        return None

    def _hear(self, worker: _Worker) -> None:
        index, _ = self._busy[worker]
        try:
            messages = worker.receive()
        except (EOFError, OSError, ValueError):
            if not worker.ready:
                raise UserError(
                    f"a grading process did not start ({worker.complaint()}): check that math-verify is installed "
                    f"beside {sys.executable}"
                ) from None
            self._finish(worker, "error")
            # The process may have been dead before it got the request, which is therefore tried once more.
            if index not in self._retried:
                self._retried.add(index)
                self._waiting.append(index)
            return
        for message in messages:
            if worker.ready:
                self._finish(worker, message["outcome"], message.get("answer"), alive=True)
            else:
                # The deadline is for comparing: its time runs from when the process has done its imports.
                worker.ready = True
                self._busy[worker] = index, time.monotonic() + self._timeout_s

    def _stop_the_late(self) -> None:
        now = time.monotonic()
        for worker in [w for w, (_, deadline) in self._busy.items() if deadline <= now]:
            if not worker.ready:
                raise UserError(
                    f"a grading process was not ready after {_STARTING_S:.0f} seconds: run the command again when the "
                    "machine is less busy"
                )
            self._finish(worker, "timeout")

    def _finish(self, worker: _Worker, outcome: Outcome, answer: str | None = None, alive: bool = False) -> None:
        index, _ = self._busy.pop(worker)
        self._selector.unregister(worker.stdout)
        answer = self._requests[index].get("shown", answer)
        if index not in self._grades:
            self._graded(index)
        self._grades[index] = Grade(outcome == "correct", answer, outcome)
        if alive:
            self._idle.append(worker)
        else:
            worker.close()
