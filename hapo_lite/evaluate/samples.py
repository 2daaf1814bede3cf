"""The samples of one model on one suite: a JSONL file with which a killed evaluation continues.

The first line is the protocol, which is everything that the samples depend on. A hash of the protocol is in the file's
name, so that samples of different protocols never mix. A line for each completion follows, prompt by prompt.
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
from hapo_lite.records import Completion, Score


@dataclass(frozen=True)
class Sample:
    """One graded completion. prompt: the prompt's id; length: tokens, with the stop's; outcome, answer: as in Grade."""

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
        """The sample of a completion and its score."""
        prompt = completion.prompt.prompt
        return cls(
            prompt=prompt.id,
            sample=completion.sample,
            gold=prompt.answer,
            outcome=score.outcome,
            answer=score.answer,
            length=completion.length,
            truncated=completion.truncated,
            text=completion.text,
        )

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


class SampleFile:
    """The file `folder/LABEL-HASH.jsonl`, to which the samples of a few prompts at a time are added.

    prompts: ids, in order; per_prompt: samples of each prompt.
    """

    def __init__(
        self, folder: Path, label: str, protocol: dict[str, Any], prompts: Sequence[str], per_prompt: int
    ) -> None:
        self.label = label
        self.prompts = tuple(prompts)
        self.per_prompt = per_prompt
        self._header = json.dumps({"protocol": protocol}, ensure_ascii=True) + "\n"
        self.path = folder / f"{label}-{hashlib.sha256(self._header.encode()).hexdigest()[:8]}.jsonl"
        self.samples: list[Sample] = []

    @property
    def done(self) -> int:
        """The number of prompts whose samples are in the file."""
        return len(self.samples) // self.per_prompt

    @property
    def complete(self) -> bool:
        return self.done == len(self.prompts)

    def resume(self, at_once: int) -> None:
        """Read the samples in the file and cut off the part that a kill left unfinished.

        A number of prompts that `at_once` divides is kept, or all prompts. The others are then sampled in the batches
        of an uninterrupted evaluation, so that the file is the same to the last byte. Raises UserError if the file has
        another protocol or cannot be written.
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
        """The samples in front of the first line that is cut off, damaged or out of place."""
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
        """Add the samples of the next prompts and wait for the disk to have them. Raises UserError if the disk refuses.

        write: false in processes other than the main one, which only remember the samples.
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
