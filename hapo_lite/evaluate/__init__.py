"""`python -m hapo_lite.evaluate` compares a base and its adapter on suites. In Python: `hapo_lite.evaluate(recipe)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hapo_lite.runs.summary import SuiteSummary


class _Callable(ModuleType):
    """A package that can be called: `hapo_lite.evaluate` is both this package and the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, SuiteSummary]:
        from hapo_lite.evaluate.evaluation import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
