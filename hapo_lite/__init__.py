"""HAPO for reasoning models on one GPU: LoRA on a 4-bit base, every token treated by its entropy (arXiv 2509.16591).

The names below are what other programs take from the package. They are imported when they are first used, so that
`import hapo_lite` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hapo_lite.evaluate.evaluation import evaluate as evaluate
    from hapo_lite.head import token_logprobs as token_logprobs
    from hapo_lite.model.load import load_policy as load_policy
    from hapo_lite.probe.probing import probe as probe
    from hapo_lite.recipe import load_recipe as load_recipe
    from hapo_lite.records import EncodedPrompt as EncodedPrompt
    from hapo_lite.records import Prompt as Prompt
    from hapo_lite.records import Request as Request
    from hapo_lite.rollout.engine import make_engine as make_engine
    from hapo_lite.rollout.sampling import AdaptiveTemperature as AdaptiveTemperature
    from hapo_lite.sft.run import sft as sft
    from hapo_lite.tasks.verify import GraderPool as GraderPool
    from hapo_lite.tasks.verify import grade as grade
    from hapo_lite.train.run import train as train

__version__ = "0.1.0"

if sys.platform == "win32":
    # Locks of run folders, limits of grading processes and signals are those of POSIX.
    raise ImportError("hapo_lite runs on Linux and macOS; on Windows it runs in WSL (wsl --install)")

_ROOMS = {
    "AdaptiveTemperature": "rollout.sampling",
    "EncodedPrompt": "records",
    "GraderPool": "tasks.verify",
    "Prompt": "records",
    "Request": "records",
    "evaluate": "evaluate",
    "grade": "tasks.verify",
    "load_policy": "model.load",
    "load_recipe": "recipe",
    "make_engine": "rollout.engine",
    "probe": "probe",
    "sft": "sft",
    "token_logprobs": "head",
    "train": "train",
}
"""By public name: the module that has it. `train`, `sft`, `evaluate` and `probe` are rooms that can be called."""

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'hapo_lite' has no attribute {name!r}")
    module = importlib.import_module(f"hapo_lite.{_ROOMS[name]}")
    return module if _ROOMS[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
