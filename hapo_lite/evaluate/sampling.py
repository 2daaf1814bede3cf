"""Sampling and grading the prompts that a file of samples lacks, a few at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

import hapo_lite
from hapo_lite.evaluate.samples import Sample, SampleFile
from hapo_lite.evaluate.suites import Suite
from hapo_lite.model.load import resolve_dtype
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.rollout.draws import DrawKey
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.interrupt import Interrupts
from hapo_lite.train.accelerator import stop_if_asked
from hapo_lite.train.collect import Collector


@dataclass
class Work:
    """One model on one suite. seconds: the time of this command, by stage; sampled: the prompts that it sampled."""

    suite: Suite
    file: SampleFile
    seconds: dict[str, float] = field(default_factory=dict)
    sampled: int = 0

    def took(self, stage: str, seconds: float) -> None:
        """Add the time of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class Asking:
    """How prompts are asked. samples: completions of each."""

    samples: int
    processor: AdaptiveTemperature
    key: DrawKey


class Sampler:
    """Fills files of samples. batch_size: completions that one process samples at once."""

    def __init__(self, collector: Collector, asking: Asking, batch_size: int) -> None:
        self.collector = collector
        self.asking = asking
        self.accelerator = collector.accelerator
        self.main = self.accelerator.is_main_process
        self.at_once = max(1, batch_size // asking.samples) * self.accelerator.num_processes
        self.interrupts = Interrupts(deferred=self.accelerator.num_processes > 1)

    def resume(self, work: Sequence[Work]) -> None:
        """Read the samples of earlier commands. The main process cuts off what is unfinished before the others read."""
        if self.main:
            self._read(work)
        self.accelerator.wait_for_everyone()
        if not self.main:
            self._read(work)
        self.accelerator.wait_for_everyone()

    def _read(self, work: Sequence[Work]) -> None:
        for w in work:
            w.file.resume(self.at_once)

    def sample(self, work: Work, bar: tqdm[Any]) -> None:
        """Sample and grade the missing prompts, a few at a time. A signal stops the work between two parts.

        Raises Interrupted then; what was sampled is in the file.
        """
        asking, prompts = self.asking, work.suite.prompts
        while not work.file.complete:
            part = prompts[work.file.done : work.file.done + self.at_once]
            sampled = self.collector.sample_and_grade(part, asking.samples, asking.processor, asking.key)
            work.took("rollout", sampled.rollout_seconds)
            work.took("grade", sampled.grade_seconds)
            graded = sampled.graded
            samples = [Sample.of(c, s) for c, s in zip(graded.completions, graded.scores, strict=True)]
            self.interrupts.shield()
            work.file.append(samples, write=self.main)
            self.interrupts.unshield()
            work.sampled += len(part)
            bar.update(len(samples))
            stop_if_asked(self.accelerator, self.interrupts)


def protocol(
    recipe: Recipe, policy: Policy, suite: Suite, adapter_sha256: str | None, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that samples and their grades depend on, except the machine's rounding.

    sampling: the settings by which completions are drawn.
    """
    model = recipe.model
    asked = json.dumps([(e.index, e.prompt.id, e.prompt.answer, e.ids) for e in suite.prompts])
    return {
        "hapo_lite": hapo_lite.__version__,
        "model": {
            "name": model.name,
            "origin": policy.origin,
            "quantization": model.quantization,
            "dtype": str(resolve_dtype(model.dtype, policy.device)).removeprefix("torch."),
            "attention": model.attention,
        },
        "adapter_sha256": adapter_sha256,
        "suite": suite.name,
        "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        **sampling,
        "seed": recipe.seed,
        "timeout_s": recipe.reward.timeout_s,
    }
