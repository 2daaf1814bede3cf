"""A reward that differs between the completions of a model that knows nothing, so that an iteration has a gradient."""

from __future__ import annotations


def spread(questions: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """A number in [0, 1) for each completion, which depends on its text alone."""
    return [sum(map(ord, text)) % 11 / 11 for text in completions]
