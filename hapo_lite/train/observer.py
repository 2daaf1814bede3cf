"""The events of an iteration that a run can react to. Stages report their progress to runs/progress.py instead."""

from __future__ import annotations

from hapo_lite.records import Graded
from hapo_lite.runs.skipped import SkippedStep


class Observer:
    """Receives the events of an iteration and ignores them. A run uses a subclass that saves and prints."""

    def before_update(self) -> None:
        """From here on the iteration is finished and recorded; until now it could be abandoned without a trace in the
        weights. Every process calls it once in every iteration, at the same place.
        """

    def on_graded(self, graded: Graded) -> None:
        """The completions of the iteration have been sampled and graded."""

    def on_skip(self, step: SkippedStep) -> None:
        """An optimiser step is skipped because a number is not finite."""

    def on_note(self, sentence: str) -> None:
        """Something happened that the user should read about."""

    def on_shortage(self, sentence: str, weights_unchanged: bool) -> None:
        """Memory ran out, and the work is repeated in smaller parts.

        weights_unchanged: the weights are still those from the start of the iteration, so a checkpoint can be written.
        """
