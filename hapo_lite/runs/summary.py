"""The types of the summaries that commands return in Python and write as summary.json."""

from __future__ import annotations

from typing import Any, TypedDict


class VerdictSummary(TypedDict):
    """word, sentence, because: as in `train.verdict.Verdict`."""

    word: str
    sentence: str
    because: tuple[str, ...]


class HeldOutSummary(TypedDict):
    """prompts: number of held-out prompts. samples: completions of each. before, after: the evaluation's line of
    metrics.jsonl; None if there was none."""

    prompts: int
    samples: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class FinishedSummary(TypedDict):
    """What is told of every finished training.

    origins: by what was loaded (model, data, adapter). adapter_sha256: of the weights in adapter/. versions: by
    package. machine: device, processes, cpu, cores.
    """

    name: str
    method: str
    seed: int
    iterations: int
    updates: int
    training_seconds: float
    evaluation: HeldOutSummary
    origins: dict[str, str]
    adapter_sha256: str
    versions: dict[str, str]
    machine: dict[str, Any]
    verdict: VerdictSummary


class RunSummary(FinishedSummary):
    """A finished run. It is empty in other processes than the main one.

    sampled_tokens: completion tokens sampled in training.
    """

    sampled_tokens: int


class EndsSummary(TypedDict):
    """A number before the first update and after the last one."""

    before: float
    after: float


class IntervalSummary(TypedDict):
    """A number and its 95 % interval over the prompts. low, high: None for a single prompt."""

    value: float
    low: float | None
    high: float | None


class AccuracySummary(TypedDict):
    """avg@n before and after, and their difference prompt by prompt."""

    before: IntervalSummary
    after: IntervalSummary
    change: IntervalSummary


class WarmSummary(FinishedSummary):
    """A finished warm start. It is empty in other processes than the main one.

    trained_tokens: completion tokens of the solutions trained on. solutions: their number, for training and held out.
    held_out_loss: nats a token; None without solutions kept aside. accuracy: None without held-out prompts. minutes: of
    training and of evaluation.
    """

    trained_tokens: int
    minutes: dict[str, float]
    solutions: dict[str, int]
    held_out_loss: EndsSummary | None
    accuracy: AccuracySummary | None


class ProbeSummary(TypedDict):
    """Pass rates of the training prompts. file: that `data.pass_rate.file` reads.

    prompts: number of those sampled; samples: completions of each. too_long: number of prompts left out. mean: of the
    pass rates. learnable: number of prompts between the default bounds of `data.pass_rate`. histogram: number of
    prompts by tenth. seconds: of this command, by stage.
    """

    file: str
    prompts: int
    samples: int
    too_long: int
    mean: float
    learnable: int
    histogram: dict[str, int]
    seconds: dict[str, float]


class SuiteSummary(TypedDict, total=False):
    """The base and the adapter on one suite, by label ("base", "adapter") where a field has one for each.

    figures: avg@n, pass@k, maj@k and length as `Interval`s. difference, verdict, sentence: absent without an adapter.
    outcomes: number of completions by outcome. seconds: of this command, by stage.
    """

    suite: str
    source: str
    origin: str
    prompts: int
    too_long: dict[str, Any]
    rows_skipped: dict[str, int]
    files: dict[str, str]
    outcomes: dict[str, dict[str, int]]
    figures: dict[str, dict[str, Any]]
    difference: dict[str, Any]
    verdict: str
    sentence: str
    notes: list[str]
    seconds: dict[str, dict[str, float]]
