"""A CPU as a platform of verl 0.9, through verl's own registers.

verl asks a platform what it may call of an accelerator, and has CUDA's, Ascend's and ROCm's. Its registry of engines
names CUDA and Ascend for FSDP. Both registers are open: what is registered here says that there is no accelerator
memory and nothing to wait for, and that collectives go over gloo.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class CpuModule:
    """Stands in for `torch.cuda`, as far as verl calls it, without an accelerator. Memory is in bytes."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> str:
        return "cpu"

    @staticmethod
    def get_device_name(*device: Any) -> str:
        return "CPU"

    @staticmethod
    def mem_get_info(*device: Any) -> tuple[int, int]:
        return 0, 0

    @staticmethod
    def memory_allocated(*device: Any) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    @staticmethod
    def _nothing(*arguments: Any, **keywords: Any) -> None:
        """No memory is kept back, and nothing runs beside the program."""

    set_device = synchronize = empty_cache = ipc_collect = manual_seed = manual_seed_all = _nothing
    reset_peak_memory_stats = set_per_process_memory_fraction = _nothing


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """Ray hands out "GPU"s to verl's workers, so `ray start` is told of two that do not exist."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuModule  # type: ignore[assignment]

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"  # verl passes it on as a `device=`; an index there would be an accelerator's

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        """The name of gloo. A worker that asks for it finds its process group open.

        verl 0.9.1 is about to open one for `cpu:gloo` and `DEVICE:BACKEND` (utils/distributed.py, line 89), unless
        there is one. With a CPU this names one device twice, which torch refuses.
        """
        if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def register_fsdp() -> None:
    """Make verl's FSDP engine that of a CPU too. Its modules ask for the platform as they are imported."""
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register("language_model", ["fsdp", "fsdp2"], "cpu")(FSDPEngineWithLMHead)
