"""`python -m hapo_lite.train`: from sampled completions to a trained adapter. In Python: `hapo_lite.train(recipe)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package and the function it is named after: `hapo_lite.train` can only be one object."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        from hapo_lite.train.run import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
