"""Prompts by the million: they are kept in a temporary file without a name and read back one at a time.

An Arrow file needs a name, so that a killed process would leave the file behind, and takes twice as long to read a
prompt from.
"""

from __future__ import annotations

import hashlib
import json
import operator
import tempfile
import threading
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from hapo_lite.errors import writing
from hapo_lite.records import Prompt

IN_MEMORY = 16 << 20
"""Most bytes of prompts that are kept without a file."""


class _Prompts(Sequence[Prompt]):
    """The base of both sequences of prompts: a slice is a tuple, and sequences of equal prompts are equal.

    origin: the origin of the data, as in sources.Table.
    """

    origin: str

    @property
    def digest(self) -> str:
        """A hash of the prompts in their order."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        if isinstance(index, slice):
            return tuple(self._at(i) for i in range(*index.indices(len(self))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self._at(int(place))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (tuple, list, _Prompts)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # object has a method here, and None marks a class without one

    def _at(self, place: int) -> Prompt:
        raise NotImplementedError


class PromptStore(_Prompts):
    """Prompts in the order they were added. Memory: 8 bytes each, beyond the first `IN_MEMORY` bytes of text.

    Columns come back as JSON has them: a date, a decimal number or bytes as text, a tuple as a list.

    The file lies where temporary files do (TMPDIR), is as large as the text, and disappears with the process, however
    the process ends. Any thread may use the store.
    """

    def __init__(self, origin: str = "") -> None:
        self.origin = origin
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (open as long as the store is)
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()

    def add(self, prompt: Prompt) -> None:
        """Add a prompt. Raises UnicodeEncodeError if its text is not Unicode, UserError if the disk refuses."""
        # A prompt without solution and columns has the bytes, and with them the digest, of versions that knew neither.
        parts: list[Any] = [prompt.id, prompt.messages, prompt.answer]
        if prompt.solution or prompt.columns:
            parts.append(prompt.solution)
        if prompt.columns:
            parts.append(prompt.columns)
        fields = json.dumps(parts, ensure_ascii=False, default=str).encode()
        with writing(Path(tempfile.gettempdir())), self._lock:
            self._file.seek(self._ends[-1])
            self._file.write(fields)
        self._ends.append(self._ends[-1] + len(fields))
        self._hash.update(fields)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _at(self, place: int) -> Prompt:
        start, end = self._ends[place : place + 2]
        with self._lock:
            self._file.seek(start)
            fields = self._file.read(end - start)
        name, messages, answer, *rest = json.loads(fields)
        return Prompt(name, tuple((role, content) for role, content in messages), answer, *rest)


class Selection(_Prompts):
    """Some of another sequence's prompts, by place."""

    def __init__(self, prompts: Sequence[Prompt], places: Sequence[int]) -> None:
        self.origin = origin_of(prompts)
        self._prompts = prompts
        self._places = array("Q", places)
        self._hash = hashlib.sha256(digest_of(prompts).encode())
        self._hash.update(self._places.tobytes())

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, place: int) -> Prompt:
        return self._prompts[self._places[place]]


def origin_of(prompts: Sequence[Prompt]) -> str:
    """The origin of the data that prompts are from; "" where it is not known."""
    return prompts.origin if isinstance(prompts, _Prompts) else ""


def digest_of(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts in their order."""
    if isinstance(prompts, _Prompts):
        return prompts.digest
    return hashlib.sha256(
        repr([(p.id, p.messages, p.answer) for p in prompts]).encode("utf-8", "surrogatepass")
    ).hexdigest()
