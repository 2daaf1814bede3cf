"""The tasks that come with the kit, by the names that a recipe gives them."""

from __future__ import annotations

from types import MappingProxyType, ModuleType

from hapo_lite.tiny import task

TASKS: MappingProxyType[str, ModuleType] = MappingProxyType({"tiny": task})
"""The modules of the built-in tasks, by `data.source`. Each has `all_problems`, `problems` and `worked_out`."""
