"""`python -m hapo_lite.train`: from sampled completions to a trained adapter. In Python: `hapo_lite.train(recipe)`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableRoom(ModuleType):
    """A package that can be called: `hapo_lite.train` is both this package and a function, and so are `sft`,
    `evaluate` and `probe`.

    entrance: the module of the package that has the function. It is imported by the first call.
    """

    entrance: str

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Call the function that has the package's own name."""
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(self.entrance), name)(*arguments, **options)


def make_callable(package: str, entrance: str) -> None:
    """Let an imported package be called. package: its name. entrance: see `CallableRoom`."""
    room = sys.modules[package]
    room.__class__ = CallableRoom
    room.__dict__["entrance"] = entrance


make_callable(__name__, "hapo_lite.train.run")
