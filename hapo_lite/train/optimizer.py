"""The optimiser and its schedule, and a step that is taken only if its numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from hapo_lite.recipe import TrainingSettings


def make_optimizer(settings: TrainingSettings, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW, whose states may be paged out to main memory."""
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if settings.optimizer == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return kind(parameters, **options)


def make_scheduler(settings: TrainingSettings, optimizer: torch.optim.Optimizer) -> Any:
    """Warm-up, then the recipe's schedule over all its updates."""
    schedule = settings.schedule
    return get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=settings.warmup_updates,
        num_training_steps=settings.iterations * settings.updates_per_iteration,
    )


def take_step(
    accelerator: Accelerator, optimizer: Any, parameters: Sequence[torch.nn.Parameter], loss: float, max_norm: float
) -> tuple[float, str | None]:
    """Clip the gradients and step. Returns their norm before clipping, and why the step was not taken, None if it was.

    optimizer: as accelerate prepared it. A step is not taken if the loss or the norm is nan or inf. With fp16's loss
    scaling it is the scaler that skips, and that lowers its scale: its step is called whatever the numbers are.
    """
    if not math.isfinite(loss):
        for p in parameters:
            p.grad.fill_(math.nan)  # The scaler looks at nothing but the gradients.
    norm = float(accelerator.clip_grad_norm_(parameters, max_norm))
    if optimizer.scaler is not None or math.isfinite(norm):
        optimizer.step()
    if math.isfinite(norm) and not optimizer.step_was_skipped:
        return norm, None
    return norm, f"its loss is {loss}" if not math.isfinite(loss) else f"its gradient's norm is {norm}"


def loss_scale(optimizer: Any) -> float:
    """What fp16's scaler multiplies the loss by; 1 without one."""
    return 1.0 if optimizer.scaler is None else float(optimizer.scaler.get_scale())
