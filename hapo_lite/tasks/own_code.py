"""Functions that a recipe names: found, imported, and described when they fail (docs/rewards.md)."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from hapo_lite.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def load_function(
    name: str, setting: str = "reward.function", files: dict[str, ModuleType] | None = None
) -> Callable[..., Any]:
    """The function behind `module:function` or `path/to/file.py:function`.

    Modules are looked for where Python does and in the current directory. setting: the setting that names the function.
    files: the files that were imported before, by path; a file in it is not run again. Raises UserError.
    """
    files = {} if files is None else files
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise UserError(
            f"{setting} {name!r} is not of the form module:function, such as my_rewards:brevity or "
            "path/to/file.py:brevity"
        )
    label = f"{setting} {name}"
    try:
        if where.endswith(".py"):
            module = files[where] = files.get(where) or _module_from_file(Path(where), label)
        else:
            module = _module(where, label)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{label}: importing {where} raised {describe_error(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise UserError(f"{label}: {where} has no function {attribute!r}; it has {', '.join(there) or 'none at all'}")
    return function


def code_of(name: str) -> str:
    """The file that `load_function` would import, found without importing it; the module's name where there is none.

    A module in a package stands for the package, so the file is the package's.
    """
    where = name.rpartition(":")[0]
    if where.endswith(".py"):
        return str(Path(where).resolve())
    spec = importlib.machinery.PathFinder.find_spec(where.partition(".")[0], [*sys.path, os.getcwd()])
    return spec.origin if spec and spec.origin else where


def describe_error(error: BaseException) -> str:
    """The type and message of an error, and the innermost place outside Python's own and installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        f
        for f in frames
        if PACKAGE not in Path(f.filename).parents
        and "site-packages" not in f.filename
        and not f.filename.startswith(("<", sys.base_prefix, sys.prefix))
    ]
    place = f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}{': ' + message if message else ''}{place}"


def _module(where: str, label: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(f"{error.name}.")):
            raise
        raise UserError(
            f"{label}: there is no module {error.name!r} in {os.getcwd()} or among the installed ones"
        ) from None


def _module_from_file(path: Path, label: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{label}: there is no file {path.resolve()}")
    spec = importlib.util.spec_from_file_location(f"hapo_lite_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{label}: Python cannot import {path.resolve()}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
