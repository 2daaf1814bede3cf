"""`python -m hapo_lite.sft`: a supervised warm start on worked solutions. In Python: `hapo_lite.sft(recipe)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hapo_lite.runs.summary import WarmSummary


class _Callable(ModuleType):
    """A package that can be called: `hapo_lite.sft` is both this package and the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> WarmSummary:
        """Call `hapo_lite.sft.run.sft`."""
        from hapo_lite.sft.run import sft

        return sft(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
