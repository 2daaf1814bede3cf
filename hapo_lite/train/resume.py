"""Resuming a run from its newest checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hapo_lite.errors import UserError, writing
from hapo_lite.recipe import Recipe
from hapo_lite.runs.checkpoint import Checkpoint, TrainState, load_checkpoint, newest_good
from hapo_lite.runs.folder import RunFolder
from hapo_lite.runs.skipped import drop_steps_after
from hapo_lite.runs.trace import drop_traces_after
from hapo_lite.train.loop import Loop


def changed_rate(checkpoint: Checkpoint, recipe: Recipe, scheduler: Any) -> str | None:
    """A sentence about a jump of the learning rate: a schedule falls over all iterations, whose number was changed.

    scheduler: as it was restored from the checkpoint.
    """
    before, now = checkpoint.record["recipe"]["training"]["iterations"], recipe.training.iterations
    last = scheduler.get_last_lr()[0]
    following = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch)
    if before == now or math.isclose(last, following, rel_tol=1e-6):
        return None
    return (
        f"training.iterations was {before} and is {now}, over which training.schedule = {recipe.training.schedule} "
        f"falls: the learning rate goes from {last:.2e} to {following:.2e}; training.iterations={before} keeps it"
    )


def resume(folder: RunFolder, recipe: Recipe, loop: Loop, say: Callable[[str], None]) -> TrainState:
    """Restore weights, optimiser and schedule from the newest good checkpoint, and return its state.

    Without a checkpoint the state is a fresh one, of the adapter that the policy began with. Metrics, traces and
    skipped steps from later iterations are removed. Raises UserError if every checkpoint is damaged or belongs to
    another recipe.
    """
    newest, complaints = newest_good(folder.checkpoints, recipe)
    for complaint in complaints:
        say(f"note: {complaint}; an older one is used")
    if newest is None and complaints:
        raise UserError(
            f"no checkpoint in {folder.checkpoints} can be used: move the folder away to start over ({complaints[0]})"
        )
    state = TrainState(started_from=loop.policy.started_from)
    last_recorded = -1  # A fresh run writes iteration 0, its first evaluation, again.
    if newest is not None:
        state = load_checkpoint(newest, loop.parts)
        last_recorded = state.iteration
        say(f"resuming {folder.path} after iteration {state.iteration}")
        # The loop's recipe: a warm start has another number of iterations than the recipe that it was read from.
        iterations = loop.recipe.training.iterations
        if state.iteration > iterations:
            say(f"note: the run is beyond training.iterations = {iterations}, and nothing is left to do")
        if note := changed_rate(newest, recipe, loop.learner.scheduler):
            say(f"note: {note}")
    elif recorded := folder.metrics.last():
        say(
            f"note: {folder.path} has no checkpoint yet: the run starts again, and what it recorded up to iteration "
            f"{recorded.get('iteration', 0)} is written again"
        )
    if loop.accelerator.is_main_process:
        with writing(folder.path):
            folder.metrics.keep_up_to(last_recorded)
            drop_traces_after(folder.traces, last_recorded)
            drop_steps_after(folder.replay, state.iteration)
    return state
