"""Writing files that survive a kill or a power cut: they are written aside, flushed, and put in place by a rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hapo_lite.errors import UserError


def replace_text(path: Path, text: str) -> None:
    """Write a file as a whole. If that fails, the file stays as it was. Raises OSError."""
    with replacing_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_file(final: Path) -> Iterator[Path]:
    """A context with the path of a temporary file, which replaces `final` at the end. On failure it is removed.

    Raises OSError.
    """
    aside = final.with_name(f".writing-{final.name}")
    try:
        yield aside
        flush(aside)
        os.replace(aside, final)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """A context with an empty folder to fill, which replaces `final` at the end. On failure the folder is removed.

    A kill leaves the folder behind as `.writing-...`. Raises OSError.
    """
    aside = final.with_name(f".writing-{final.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            flush(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        flush(final.parent)
    except BaseException:  # Ctrl-C too, since a half-written folder may hold many gigabytes.
        shutil.rmtree(aside, ignore_errors=True)
        raise


def inside(folder: Path, path: Path) -> Path:
    """`path` with links followed. Raises UserError if the result is outside `folder`."""
    resolved = path.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads out of {folder}: nothing outside it is opened")
    return resolved


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
