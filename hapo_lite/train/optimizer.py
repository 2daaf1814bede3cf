"""The optimiser, its schedule, and the optimiser step, which is skipped if its numbers are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from hapo_lite.model.policy import Policy
from hapo_lite.recipe import TrainingSettings


@dataclass
class Learner:
    """The optimiser as accelerate prepared it, its schedule, and the adapter's parameters in a fixed order."""

    optimizer: Any
    scheduler: Any
    parameters: list[torch.nn.Parameter]


def make_learner(settings: TrainingSettings, policy: Policy, accelerator: Accelerator) -> Learner:
    """The optimiser and the schedule of a run's adapter."""
    parameters = list(policy.trainable().values())
    optimizer = make_optimizer(settings, parameters)
    # The schedule notes each step of the optimiser, by a wrapper that accelerate must find and keep.
    scheduler = make_scheduler(settings, optimizer)
    optimizer = accelerator.prepare(optimizer)
    if optimizer.scaler is not None:
        # The scaler makes its scale at the first loss, and a step without a loss of this process needs the scale too.
        optimizer.scaler.scale(torch.zeros((), device=accelerator.device))
    return Learner(optimizer, scheduler, parameters)


def make_optimizer(settings: TrainingSettings, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW, whose states may be paged out to main memory."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if settings.optimizer == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(parameters, lr=rate, weight_decay=decay)


def make_scheduler(settings: TrainingSettings, optimizer: torch.optim.Optimizer) -> Any:
    """The recipe's schedule over all its updates, with warm-up first."""
    schedule = settings.schedule
    return get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=settings.warmup_updates,
        num_training_steps=settings.iterations * settings.updates_per_iteration,
    )


class StepResult(NamedTuple):
    """norm: of the gradients before clipping. problem: why the step was skipped; None if it was taken."""

    norm: float
    problem: str | None


def take_step(
    accelerator: Accelerator, optimizer: Any, parameters: Sequence[torch.nn.Parameter], loss: float, max_norm: float
) -> StepResult:
    """Clip the gradients and step, unless the loss or the norm is nan or inf.

    optimizer: as accelerate prepared it. With fp16's loss scaling, its step is always called: the scaler skips the step
    itself, and lowers its scale.
    """
    if not math.isfinite(loss):
        for p in parameters:
            if p.grad is not None:
                p.grad.fill_(math.nan)  # The scaler looks at nothing but the gradients.
    norm = float(accelerator.clip_grad_norm_(parameters, max_norm))
    if optimizer.scaler is not None or math.isfinite(norm):
        optimizer.step()
    if math.isfinite(norm) and not optimizer.step_was_skipped:
        return StepResult(norm, None)
    if not math.isfinite(loss):
        return StepResult(norm, f"its loss is {loss}")
    return StepResult(norm, f"its gradient's norm is {norm}")


def advance(accelerator: Accelerator, learner: Learner, loss: float, max_norm: float) -> StepResult:
    """`take_step` and, if the step was taken, the schedule's next rate."""
    result = take_step(accelerator, learner.optimizer, learner.parameters, loss, max_norm)
    if result.problem is None:
        learner.scheduler.step()
    return result


def loss_scale(optimizer: Any) -> float:
    """The factor by which fp16's scaler multiplies the loss; 1 without a scaler."""
    return 1.0 if optimizer.scaler is None else float(optimizer.scaler.get_scale())
