"""Errors that mean that memory ran out."""

from __future__ import annotations

import torch
from accelerate.utils.memory import should_reduce_batch_size


class OutOfMemory(MemoryError):
    """Memory ran out in at least one process. The message says how much was requested."""


FAILED_ALLOCATIONS = (
    "CUDA error: out of memory",  # torch, where the driver fails outside torch's allocator
    "CUDA Error: out of memory",  # vLLM's allocator, as it wakes from sleep
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS found no memory for its handle
    "DefaultCPUAllocator: not enough memory",
)
"""Parts of the messages that accelerate's `should_reduce_batch_size` does not know."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation: on a GPU, in torch on a CPU, or in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # accelerate looks for words in the first argument, which is an operator in some errors of torch.
    known = all(isinstance(argument, str) for argument in error.args) and should_reduce_batch_size(error)
    return known or any(text in str(error) for text in FAILED_ALLOCATIONS)
