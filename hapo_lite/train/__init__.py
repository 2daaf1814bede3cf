"""`python -m hapo_lite.train`: from sampled completions to a trained adapter. In Python: `hapo_lite.train(recipe)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hapo_lite.runs.summary import RunSummary


class _Callable(ModuleType):
    """A package that can be called, since `hapo_lite.train` is both this package and the function `train`."""

    def __call__(self, *arguments: Any, **options: Any) -> RunSummary:
        """Call `hapo_lite.train.run.train`."""
        from hapo_lite.train.run import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
