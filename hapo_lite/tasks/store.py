"""Prompts by the million: kept in a temporary file that has no name, and read back one at a time.

An Arrow file would need a name, by which a kill would leave it behind, and takes twice as long to read a prompt from.
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
from typing import overload

from hapo_lite.errors import writing
from hapo_lite.records import Prompt

IN_MEMORY = 16 << 20
"""Bytes of prompts that need no file."""


class _Prompts(Sequence[Prompt]):
    """What both kinds share: a slice is a tuple, and equal prompts make equal sequences of any kind.

    digest: changes with any prompt, or their order. origin: of the data that they are from, as in sources.Table.
    """

    digest: str
    origin: str

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index):
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

    __hash__ = None

    def _at(self, place: int) -> Prompt:
        raise NotImplementedError


class PromptStore(_Prompts):
    """Prompts in the order they were added. Memory: 8 bytes each, beyond the first `IN_MEMORY` bytes of text.

    The file lies where temporary files do (TMPDIR), is as large as the text, and is gone with the process however that
    ends. Usable from any thread.
    """

    def __init__(self, origin: str = "") -> None:
        self.origin = origin
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 (open as long as the store is)
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()

    def add(self, prompt: Prompt) -> None:
        """Raises UnicodeEncodeError where the text is no Unicode, UserError where the disk refuses."""
        fields = json.dumps([prompt.id, prompt.messages, prompt.answer], ensure_ascii=False).encode()
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
        name, messages, answer = json.loads(fields)
        return Prompt(name, tuple((role, content) for role, content in messages), answer)


class Selection(_Prompts):
    """Some of another sequence's prompts, by place."""

    def __init__(self, prompts: Sequence[Prompt], places: Sequence[int]) -> None:
        self._prompts, self._places = prompts, array("Q", places)
        together = hashlib.sha256(digest_of(prompts).encode())
        together.update(self._places.tobytes())
        self.digest = together.hexdigest()
        self.origin = origin_of(prompts)

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, place: int) -> Prompt:
        return self._prompts[self._places[place]]


def origin_of(prompts: Sequence[Prompt]) -> str:
    """Of the data that prompts are from; "" where it is not known."""
    return prompts.origin if isinstance(prompts, _Prompts) else ""


def digest_of(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts, in their order."""
    if isinstance(prompts, _Prompts):
        return prompts.digest
    return hashlib.sha256(
        repr([(p.id, p.messages, p.answer) for p in prompts]).encode("utf-8", "surrogatepass")
    ).hexdigest()
