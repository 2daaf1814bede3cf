"""Where a run goes on from."""

from __future__ import annotations

from hapo_lite.errors import UserError, writing
from hapo_lite.recipe import Recipe
from hapo_lite.runs.checkpoint import TrainState, load_checkpoint, newest_good
from hapo_lite.runs.folder import RunFolder
from hapo_lite.runs.skipped import drop_steps_after
from hapo_lite.runs.trace import drop_traces_after
from hapo_lite.train.loop import Loop


def resume(folder: RunFolder, recipe: Recipe, loop: Loop, say) -> TrainState:
    """The state to go on from, with weights, optimiser and schedule put back; a fresh one if there is no checkpoint."""
    newest, complaints = newest_good(folder.checkpoints, recipe)
    for complaint in complaints:
        say(f"note: {complaint}; an older one is used")
    if newest is None and complaints:
        raise UserError(
            f"no checkpoint in {folder.checkpoints} can be used: move the folder away to start over ({complaints[0]})"
        )
    state = TrainState()
    if newest is not None:
        state = load_checkpoint(newest, loop.policy, loop.optimizer, loop.scheduler, loop.stream)
        say(f"resuming {folder.path} after iteration {state.iteration}")
    if loop.accelerator.is_main_process:
        with writing(folder.path):
            folder.metrics.keep_up_to(state.iteration if newest else -1)
            drop_traces_after(folder.traces, state.iteration if newest else -1)
            drop_steps_after(folder.replay, state.iteration)
    return state
