"""The samples of one model on one suite: a JSONL file that a killed evaluation goes on with.

Its first line is the protocol, all that decides what the samples are; a hash of it is in the file's name, so that
samples made in another way never meet. Then a line a completion, prompt by prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError, writing
from hapo_lite.records import Completion
from hapo_lite.tasks.rewards import Score


@dataclass(frozen=True)
class Sample:
    """One graded completion. prompt: its id; length: tokens, stop token included; outcome, answer: as in Grade."""

    prompt: str
    sample: int
    gold: str
    outcome: str
    answer: str | None
    length: int
    truncated: bool
    text: str

    @classmethod
    def of(cls, completion: Completion, score: Score) -> Sample:
        prompt = completion.prompt.prompt
        return cls(
            prompt.id,
            completion.sample,
            prompt.answer,
            score.outcome,
            score.answer,
            completion.length,
            completion.truncated,
            completion.text,
        )

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


class SampleFile:
    """`folder/LABEL-HASH.jsonl`, grown a few prompts at a time.

    prompts: ids, in order; per_prompt: samples of each. `done` is how many prompts are in it.
    """

    def __init__(
        self, folder: Path, label: str, protocol: dict[str, Any], prompts: Sequence[str], per_prompt: int
    ) -> None:
        self.label, self.prompts, self.per_prompt = label, tuple(prompts), per_prompt
        self._header = json.dumps({"protocol": protocol}, ensure_ascii=True) + "\n"
        self.path = folder / f"{label}-{hashlib.sha256(self._header.encode()).hexdigest()[:8]}.jsonl"
        self.samples: list[Sample] = []

    @property
    def done(self) -> int:
        return len(self.samples) // self.per_prompt

    @property
    def complete(self) -> bool:
        return self.done == len(self.prompts)

    def resume(self, at_once: int) -> None:
        """Read what is there and cut off what a kill left unfinished.

        What stays are prompts in whole parts of `at_once`, or all of them: the rest is then sampled in the batches that
        an uninterrupted evaluation would have used, and comes out the same to the last byte. Raises UserError where
        the file is not of this protocol or cannot be written.
        """
        if not self.path.is_file():
            return
        with writing(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and lines[0] != self._header.encode() and lines[0].endswith(b"\n"):
            raise UserError(f"{self.path} does not begin with the settings that its name stands for: move it away")
        found = list(self._whole(lines[1:]))
        prompts = len(found) // self.per_prompt
        if prompts < len(self.prompts):
            prompts -= prompts % at_once
        self.samples = found[: prompts * self.per_prompt]
        keep = lines[: 1 + len(self.samples)] if self.samples else []
        with writing(self.path):
            os.truncate(self.path, sum(map(len, keep)))

    def _whole(self, lines: Sequence[bytes]) -> Iterator[Sample]:
        """The samples up to the first line that is cut off, damaged or out of place."""
        for i, line in enumerate(lines[: len(self.prompts) * self.per_prompt]):
            try:
                sample = Sample(**json.loads(line))
            except (ValueError, TypeError):
                return
            place, number = divmod(i, self.per_prompt)
            if not line.endswith(b"\n") or (sample.prompt, sample.sample) != (self.prompts[place], number):
                return
            yield sample

    def append(self, samples: Sequence[Sample], write: bool = True) -> None:
        """Add the samples of the next prompts and see them on the disk. Raises UserError if the disk refuses.

        write: false in the processes that are not the main one.
        """
        if write:
            self._write(samples)
        self.samples += samples

    def _write(self, samples: Sequence[Sample]) -> None:
        text = "" if self.samples else self._header
        text += "".join(json.dumps(asdict(sample), ensure_ascii=True) + "\n" for sample in samples)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
