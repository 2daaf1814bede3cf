"""What a warm start writes at its end: its table, its curves, its verdict and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np

from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.sft.loop import WarmLoop
from hapo_lite.train.curves import Panels
from hapo_lite.train.intervals import mean_interval, paired_interval
from hapo_lite.train.recorder import Recorder
from hapo_lite.train.verdict import Verdict, judge_held_out

Lines = Sequence[Mapping[str, Any]]


class WarmRecorder(Recorder):
    """Writes the files of a warm start."""

    headline_of: ClassVar[dict[str, str]] = {
        "sft/loss": "loss",
        "sft/held_out_loss": "held-out loss",
        "eval/accuracy": "avg@n",
    }
    rows: ClassVar[Sequence[tuple[str, str]]] = (
        ("sft/held_out_loss", "held-out loss, nats a token"),
        ("sft/loss", "training loss, nats a token"),
        ("eval/accuracy", "held-out accuracy, avg@{n}"),
        ("eval/length_mean", "held-out length, tokens"),
        ("eval/truncated_share", "held-out cut off at the limit"),
        ("eval/unparseable_share", "held-out without an answer"),
        ("seconds/iteration", "seconds per update"),
    )
    panels: ClassVar[Panels] = (
        ("loss, nats a token", {"sft/loss": "training", "sft/held_out_loss": "held out"}),
        ("learning rate", {"update/learning_rate": "learning rate"}),
        ("tokens read a second", {"tokens_per_second/read": "tokens a second"}),
    )

    def judge(self, lines: list[dict[str, Any]]) -> Verdict:
        """The verdict by the held-out answers; without them, only the held-out loss is told."""
        verdict = judge_held_out(lines, self.recipe)
        if verdict is not None:
            return verdict
        losses = [line["sft/held_out_loss"] for line in lines if "sft/held_out_loss" in line]
        ask = "set evaluation.prompts to measure the answers"
        if len(losses) < 2:
            return Verdict("not measured", f"not measured: {ask}")
        told = f"the held-out loss went from {losses[0]:.3f} to {losses[-1]:.3f} nats a token"
        return Verdict("not measured", f"not measured: {told}; {ask}")

    def summary(self, state: TrainState, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The summary of a run, with the losses and avg@n before and after and the share of time."""
        losses = [line["sft/held_out_loss"] for line in lines if "sft/held_out_loss" in line]
        seconds = sum(line.get("seconds/evaluate", 0.0) + line.get("seconds/held_out_loss", 0.0) for line in lines)
        summary = super().summary(state, lines)
        del summary["sampled_tokens"]
        return summary | {
            "method": "sft",
            "trained_tokens": state.tokens,
            "solutions": {"training": len(self.loop.stream.prompts), "held_out": len(cast(WarmLoop, self.loop).kept)},
            "held_out_loss": {"before": losses[0], "after": losses[-1]} if losses else None,
            "accuracy": accuracy(lines, self.recipe.evaluation.samples),
            "minutes": {"training": round(state.seconds / 60, 2), "evaluation": round(seconds / 60, 2)},
        }


def accuracy(lines: Lines, samples: int) -> dict[str, Any] | None:
    """avg@n before and after and its change, each with its 95 % interval over the prompts; None without both.

    samples: n of avg@n.
    """
    evaluated = [np.array(line["eval/solved"]) / samples for line in lines if "eval/solved" in line]
    if len(evaluated) < 2:
        return None
    before, after = evaluated[0], evaluated[-1]
    return {
        "before": mean_interval(before, step=1.0 / samples).within(0.0, 1.0).as_json(),
        "after": mean_interval(after, step=1.0 / samples).within(0.0, 1.0).as_json(),
        "change": paired_interval(before, after, step=1.0 / samples).as_json(),
    }
