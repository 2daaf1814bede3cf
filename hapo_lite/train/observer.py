"""What a run does while its loop works. Which stage has begun and how far it is, runs/progress.py is told."""

from __future__ import annotations

from hapo_lite.runs.skipped import SkippedStep


class Observer:
    """Told what happens in an iteration; does nothing about it. A run has a subclass that saves and speaks."""

    def before_update(self) -> None:
        """The weights are about to change: until now the iteration could be abandoned, from now on it is finished."""

    def on_skip(self, step: SkippedStep) -> None:
        """An optimiser step is not taken, since a number is not finite."""

    def on_shortage(self, sentence: str, weights_unchanged: bool) -> None:
        """Memory ran out and the work is repeated in smaller parts.

        weights_unchanged: the weights are those that the iteration began with, so that a checkpoint can be written.
        """
