"""The module that VERL_USE_EXTERNAL_MODULES names: hapo_lite's plug-in on a CPU, with files of what it hands on."""

from benchmarks.verl_smoke.cpu import register_fsdp  # registers the platform, for which the next import asks
from benchmarks.verl_smoke.recorder import RecordedTrainer

__all__ = ["RecordedTrainer"]

register_fsdp()
