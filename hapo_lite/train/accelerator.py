"""Devices and processes of a run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradScalerKwargs

from hapo_lite.errors import UserError
from hapo_lite.model.load import resolve_dtype
from hapo_lite.recipe import Recipe
from hapo_lite.runs.interrupt import Interrupted, Interrupts

LOSS_SCALING = GradScalerKwargs(init_scale=4096.0, growth_interval=100)
"""fp16's loss scaling. A run takes hundreds of steps and stops after `training.max_skipped` skipped ones in a row.
torch's own 65,536 may be too large for several steps in a row, and grows again only after 2,000 steps."""


def stop_if_asked(accelerator: Accelerator, interrupts: Interrupts) -> None:
    """Raise Interrupted in every process if one has a signal pending. All must call this at the same place."""
    asked = interrupts.pending is not None
    if accelerator.num_processes > 1:
        asked = bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum") > 0)
    if asked:
        raise Interrupted(interrupts.pending or signal.SIGTERM)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The run's Accelerator, with its device, mixed precision and tracker.

    Raises UserError if a package is missing, the precision needs a GPU, or FSDP or DeepSpeed was configured.
    """
    tracker = recipe.logging.report_to
    # A folder of that name in the current directory can be imported too, and is no tracker.
    if tracker != "none" and tracker not in importlib.metadata.packages_distributions():
        raise UserError(f"logging.report_to = {tracker} needs a package that is not installed: pip install {tracker}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(recipe.model.dtype, device)
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError("model.dtype = fp16 needs a GPU; use auto, fp32 or bf16 on a CPU")
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "no"}[dtype]
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        log_with=None if tracker == "none" else tracker,
        project_dir=str(recipe.run_dir),
        kwargs_handlers=[LOSS_SCALING],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported here: launch it with recipes/accelerate/ddp.yaml, "
            "or hapo_lite.train with recipes/accelerate/fsdp.yaml"
        )
    return accelerator


def busy_cpu(device: torch.device) -> str | None:
    """A sentence if a CPU is to compute with several threads, and had more to do in the last minute than it has cores.

    Threads that share an operator wait for the one that another program holds up, so one thread is then faster.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load = os.getloadavg()[0]
    if device.type != "cpu" or threads == 1 or load <= cores:
        return None
    return (
        f"in the last minute {load:.0f} tasks shared {cores} cores: while other programs are at work, one thread "
        f"(OMP_NUM_THREADS=1) may be many times faster than {threads}"
    )


def unseen_gpu() -> str | None:
    """A sentence if this machine has an NVIDIA driver and torch sees no GPU; else None."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"there is an NVIDIA driver here, but torch {torch.__version__}, {built}, sees no GPU, so the CPU computes: "
        "install a build of torch for a CUDA version that the driver has (nvidia-smi prints it)"
    )
