"""Errors whose message is meant for the user."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong, where, and what to do.

    The command lines print it without a traceback and exit with code 2.
    """


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError, or safetensors' own for it, into a UserError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {disk_problem(error)}") from error


def disk_problem(error: BaseException) -> str:
    """One clause about why a file could not be written."""
    # safetensors has an error of its own, with the system's text inside.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    if full:
        return "the disk is full; free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; check the folder and run the same command again"
    return f"{str(error).splitlines()[0]}; check the folder and run the same command again"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's type where it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
