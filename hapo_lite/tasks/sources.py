"""The sources of rows, read a piece at a time: a local file, a hub data set or the built-in task.

Local files are read with pyarrow and the standard library. Both keep no cache, while the cache of datasets can go
stale: it identifies a file by its path and time alone. Only a .json file with one list has to be read whole.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError
from hapo_lite.recipe import DataSettings
from hapo_lite.runs.files import file_hash
from hapo_lite.tiny.bundled import TASKS

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
LONGEST_LINE = 1 << 26
"""Most bytes of a line of JSON: a longer one is not a row but a mistake, or an attack on the memory."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_FIRST = 1_000
"""Rows at the start of a JSON Lines file whose columns are the file's; also the rows that are read at once."""

_TOO_MANY = "\0"
"""The key of the fields that the header of a CSV file has no names for. No column can be called so."""

Rows = Iterator[dict[str, Any]]


class HubUnavailable(UserError):
    """A hub data set cannot be loaded. what: the clause that says which one and why, without advice."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice}")
        self.what = what


@dataclass(frozen=True)
class Table:
    """A source of rows. name: its name in messages; stem: the first part of its ids; columns: their dotted names.

    read: takes the columns needed and gives the rows; iterating over them raises UserError if the source is damaged.
    origin: the commit of a hub data set or the hash of a file, "" where it is not known. header: whether the first line
    of the file names the columns.
    """

    name: str
    stem: str
    columns: Sequence[str]
    read: Callable[[Iterable[str]], Rows]
    origin: str = ""
    header: bool = False


def open_table(data: DataSettings) -> Table:
    """Open `data.source`. Raises UserError if it does not exist or cannot be read."""
    path = Path(data.source)
    if data.source in TASKS:
        return _built_in(data.source, data.split)
    if path.is_dir():
        raise UserError(f"data.source {data.source} is a folder: name one of its {', '.join(SUFFIXES)} files")
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise UserError(f"there is no data file {path}{_nearest_file(path)}")
        return _file(path)
    if path.is_file():
        raise UserError(f"the data file {path} ends in {path.suffix or 'nothing'}: use one of {', '.join(SUFFIXES)}")
    if path.is_absolute() or data.source.startswith((".", "~")) or data.source.count("/") > 1:
        raise UserError(
            f"there is no data file {data.source}, and a hub data set is named `name` or `owner/name`: check the path"
        )
    return _hub(data)


def _built_in(name: str, split: str) -> Table:
    task = TASKS[name]
    try:
        chosen = task.problems(split)
    except ValueError as error:
        raise UserError(f"data.split: {error}") from None

    def read(columns: Iterable[str]) -> Rows:
        solved = "solution" in columns
        for problem in chosen:
            row = {"problem": problem.prompt, "answer": str(problem.answer)}
            yield row | ({"solution": task.worked_out(problem)} if solved else {})

    return Table("the built-in task", f"{name}-{split}", ("problem", "answer", "solution"), read)


def _file(path: Path) -> Table:
    readers = {".parquet": _parquet, ".csv": _csv, ".json": _json, ".jsonl": _json}
    with _Reading(path):
        columns, read = readers[path.suffix.lower()](path)
        origin = f"sha256 {file_hash(path)}"
    header = path.suffix.lower() == ".csv"
    return Table(str(path), path.stem, columns, lambda needed: _watched(path, read(needed)), origin, header)


def _watched(path: Path, rows: Rows) -> Rows:
    with _Reading(path):
        yield from rows


class _Reading:
    """Turns the errors of the readers of a file into one sentence. pyarrow's errors are ValueErrors or OSErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, RecursionError, MemoryError, csv.Error)):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            advice = f"check that it is a {self.path.suffix} file"
            if isinstance(error, UnicodeDecodeError) and self.path.suffix != ".parquet":
                advice = "save it as UTF-8 text"
            raise UserError(f"the data file {self.path} cannot be read ({reason}): {advice}") from None


def _parquet(path: Path) -> tuple[list[str], Callable[[Iterable[str]], Rows]]:
    import pyarrow.parquet as pq

    # pre_buffer would read ahead a whole row group, which may be the whole file.
    file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16)

    def read(needed: Iterable[str]) -> Rows:
        wanted = {name.split(".")[0] for name in needed} | set(needed)
        present = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(_FIRST, columns=present):
            yield from batch.to_pylist()

    return _arrow_columns(file.schema_arrow), read


def _csv(path: Path) -> tuple[list[str], Callable[[Iterable[str]], Rows]]:
    """Fields are separated by commas or, where the first line has none, by semicolons or tabs."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        first = lines.readline(LONGEST_LINE)
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        lines.seek(0)
        columns = list(csv.DictReader(lines, strict=True, delimiter=separator).fieldnames or ())

    def read(needed: Iterable[str]) -> Rows:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True, delimiter=separator, restkey=_TOO_MANY)
            for row in reader:
                if _TOO_MANY in row:
                    raise ValueError(
                        f"line {reader.line_num} has {len(columns) + len(row[_TOO_MANY])} fields and the first line "
                        f"{len(columns)}: a field that contains {separator!r} must stand in double quotes"
                    )
                yield row

    return columns, read


def _json(path: Path) -> tuple[list[str], Callable[[Iterable[str]], Rows]]:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() == ".json" and start.startswith(b"["):
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = [_object(row, f"entry {number}") for number, row in enumerate(entries, 1)]
        return _names(rows), lambda needed: iter(rows)
    return _names(itertools.islice(_lines(path), _FIRST)), lambda needed: _lines(path)


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in _dotted(row)))


def _lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {number} is longer than {LONGEST_LINE:,} bytes")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            if text.strip():
                yield _object(row, f"line {number}")


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with columns")
    return row


def _hub(data: DataSettings) -> Table:
    import datasets

    named = " ".join(filter(None, (data.source, data.config)))
    try:
        rows = datasets.load_dataset(data.source, data.config, split=data.split, revision=data.revision)
        columns = _arrow_columns(rows.features.arrow_schema)
    except Exception as error:
        # Hub and builder errors come from many libraries, with no common base class.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise HubUnavailable(
            f"the hub data set {named!r}, split {data.split!r}, cannot be loaded ({type(error).__name__}: {reason})",
            "check data.source, data.config, data.split and the connection, or give a local file",
        ) from None

    commit = _commit_of(rows)
    if commit and data.revision and COMMIT.fullmatch(data.revision) and commit != data.revision:
        raise UserError(
            f"the hub data set {named!r} is here at commit {commit} only, and the hub cannot be reached: try "
            f"again when it can, or set data.revision={commit}"
        )

    def read(needed: Iterable[str]) -> Rows:
        # Row by row DAPO-Math-17k would take minutes: it repeats itself to 1.8 million rows.
        for table in rows.with_format("arrow").iter(_FIRST):
            yield from table.to_pylist()

    stem = data.source.rsplit("/", 1)[-1]
    return Table(f"the data set {named}", stem, columns, read, f"commit {commit}" if commit else "")


def _commit_of(rows: Any) -> str | None:
    """The commit that a hub data set was made from: datasets names the folder of the data set after it.

    Without a connection datasets takes the newest commit in its cache, whatever revision was asked for.
    """
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    found = folders.pop() if len(folders) == 1 else ""
    return found if COMMIT.fullmatch(found) else None


def _arrow_columns(schema: Any) -> list[str]:
    names = []
    for field in schema:
        names.append(field.name)
        if hasattr(field.type, "fields") and not str(field.type).startswith(("list", "large_list", "map")):
            names += [f"{field.name}.{below}" for below in _arrow_columns(field.type)]
    return names


def _dotted(row: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in row.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist"
    siblings = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES)
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ": check data.source"
