"""Errors whose message is meant for the user, and helpers for the sentences that users read."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """An error that the user can fix. Its text is one sentence that says what is wrong, where, and what to do.

    The command lines print it without a traceback and exit with its `exit_code`.
    """

    exit_code = 2


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, or a SafetensorError, into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {disk_problem(error)}") from error


def disk_problem(error: BaseException) -> str:
    """One clause that says why a file could not be written."""
    # A SafetensorError has no errno. It has the system's message in its text.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    if full:
        return "the disk is full; free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check the folder and run the same command again"
    return f"{first_line(error)}; check the folder and run the same command again"


def page(name: str) -> str:
    """The path of a page of the documentation: in docs/ of a checkout, else in the installed package."""
    package = Path(__file__).parent
    if (package.parent / "docs").is_dir() and (package.parent / "pyproject.toml").is_file():
        return f"docs/{name}"
    return str(package / "docs" / name)


def counted(count: int, noun: str) -> str:
    """A count with its noun in the right number, such as 1 row, 2 rows or 12,000 rows. noun: with a regular plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's type where it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
