"""Predictions and measurements as a table, and sentences about whether they fit a card."""

from __future__ import annotations

from collections.abc import Sequence

from hapo_lite.errors import counted
from hapo_lite.preflight.advise import Advice, usable
from hapo_lite.preflight.measure import Measured
from hapo_lite.recipe import Recipe
from hapo_lite.train.memory.predict import PARTS, Stage

MIB = 2**20
GIB = 2**30


def memory_table(stages: Sequence[Stage], measured: Measured | None) -> str:
    """A table in MiB: parts in rows, stages in columns, then the measurements and the seconds of an iteration."""
    names = [stage.name for stage in stages]
    rows = [("MiB at the peak", *names)]
    for part in PARTS:
        values = [stage.parts.get(part, 0) for stage in stages]
        if any(values):
            rows.append((part, *(f"{value / MIB:,.1f}" if value else "" for value in values)))
    rows.append(("predicted", *(f"{stage.total / MIB:,.1f}" for stage in stages)))
    if measured is not None:
        rows.append(("measured", *(f"{measured.allocated[name] / MIB:,.1f}" for name in names)))
        if measured.reserved is not None:
            rows.append(("reserved by torch", *(f"{measured.reserved[name] / MIB:,.1f}" for name in names)))
        rows.append(("seconds an iteration", *(f"{measured.seconds[name]:,.2f}" for name in names)))
    return "\n".join(f"{row[0]:<22}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def verdict(stages: Sequence[Stage], measured: Measured | None, card: int) -> str:
    """A sentence about whether the recipe fits a card of `card` bytes, by measurements if there are any."""
    peaks = {stage.name: measured.allocated[stage.name] if measured else stage.total for stage in stages}
    worst = max(peaks, key=lambda name: peaks[name])
    word = "fits" if peaks[worst] <= usable(card) else "does not fit"
    return (
        f"{word}: the {worst} takes {peaks[worst] / GIB:.2f} GiB of the {usable(card) / GIB:.2f} that a memory of "
        f"{card / GIB:.3g} GiB leaves for tensors"
    )


def suggestion(advice: Advice, recipe: Recipe) -> str:
    """The settings that fit, each with the recipe's value, and the longest completion that would fit.

    A size above that of a whole iteration is never reached, so it is not advised, and the recipe's may be larger.
    """
    rollout = recipe.rollout
    present = {
        "training.micro_batch_tokens": str(recipe.training.micro_batch_tokens),
        "rollout.batch_size": str(rollout.batch_size),
        "rollout.max_new_tokens": str(rollout.max_new_tokens),
    }
    whole = rollout.prompts_per_iteration * rollout.completions_per_prompt
    if rollout.batch_size > advice.batch_size == whole:
        present["rollout.batch_size"] += f", which fits too: an iteration samples {counted(whole, 'completion')} in all"
    lines = [f"  {name}={value}    (the recipe has {present[name]})" for name, value in advice.settings().items()]
    return "\n".join(["largest settings that fit:", *lines, _longest_completion(advice, rollout.max_new_tokens)])


def _longest_completion(advice: Advice, present: int) -> str:
    """A sentence about the longest completion that would fit. present: the recipe's, tokens."""
    bounded_by_context = advice.longest == advice.context_left
    tokens = counted(advice.longest, "token")
    if bounded_by_context and advice.longest <= present:
        return f"completions cannot be longer: the model's context leaves {tokens} after the longest prompt"
    why = ", all that the model's context leaves after the longest prompt" if bounded_by_context else ""
    return f"with micro-batches of one sequence and one group sampled at once, completions of {tokens} would fit{why}"
