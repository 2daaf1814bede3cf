"""`python -m hapo_lite.evaluate`: suites, samples that resume, the verdict. In Python: `hapo_lite.evaluate(recipe)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package and the function it is named after: `hapo_lite.evaluate` can only be one object."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        from hapo_lite.evaluate.evaluation import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
