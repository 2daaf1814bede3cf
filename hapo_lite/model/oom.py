"""Errors that mean that memory ran out."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size


class OutOfMemory(MemoryError):
    """Memory ran out in at least one process. The message says how much was requested."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation: on a GPU, in torch on a CPU, or in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    known = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: not enough memory")
    return isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or any(k in str(error) for k in known))
