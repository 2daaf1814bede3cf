"""The models and the tasks that come with the kit, by the names that a recipe gives them."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, ModuleType

from hapo_lite.tiny import sums, task

FOLDER = Path(__file__).parent
MODELS = MappingProxyType({"tiny": FOLDER / "model", "tiny_sums": FOLDER / "sums_model"})
"""The folders of the bundled models, by `model.name`."""
TASKS: MappingProxyType[str, ModuleType] = MappingProxyType({"tiny": task, "tiny_sums": sums})
"""The modules of the built-in tasks, by `data.source`. Each has `all_problems`, `problems` and `worked_out`."""


def loadable(name: str) -> str:
    """What `from_pretrained` takes for `model.name`: the folder of a bundled model, else the name itself."""
    return str(MODELS[name]) if name in MODELS else name


def same_bundled(one: str, other: str) -> bool:
    """Whether two folders are the same bundled model, whose path differs between installations."""
    ends = {Path(path).parts[-3:] for path in (one, other)}
    return ends <= {folder.parts[-3:] for folder in MODELS.values()} and len(ends) == 1
