"""Data sets become prompts: a local file, a hub data set or the built-in task; any columns, one record.

Local files are read with pyarrow and the standard library, which keep no cache that could go stale.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError
from hapo_lite.recipe import DataSettings
from hapo_lite.records import Prompt
from hapo_lite.tasks.verify import LONGEST_ANSWER, boxed_answer
from hapo_lite.tiny.task import problems

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
PROBLEM_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "solution")

_FINAL = re.compile(r"####[ \t]*([^\n]*)")
_GROUPED = re.compile(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of the data. skipped: how many rows were left out, by reason."""

    prompts: tuple[Prompt, ...]
    skipped: Mapping[str, int]


@dataclass(frozen=True)
class _Table:
    """Rows with the dotted names of their columns. name: for messages; stem: for ids."""

    name: str
    stem: str
    columns: Sequence[str]
    rows: Iterable[dict[str, Any]]


class _Unusable(Exception):
    """Why a row is left out."""


def load_prompts(data: DataSettings) -> PromptSet:
    """Read `data.source`. `data.limit` counts prompts that are kept, not rows.

    A row is left out, and counted, where its problem or answer is missing or of no use, or where its problem stood in
    an earlier row. Raises UserError where the source, its columns or all of its rows are of no use.
    """
    table = _open(data)
    problem_column = _column(table, data.problem_column, PROBLEM_COLUMNS, "problem_column")
    answer_column = _column(table, data.answer_column, ANSWER_COLUMNS, "answer_column")
    prompts: dict[tuple[tuple[str, str], ...], Prompt] = {}
    ids: set[str] = set()
    skipped: Counter[str] = Counter()
    row_number = -1
    for row_number, row in enumerate(table.rows):
        if len(prompts) == data.limit:
            break
        try:
            messages = _messages(_value(row, problem_column), data.system_prompt)
            answer = _answer(_value(row, answer_column))
        except _Unusable as reason:
            skipped[str(reason)] += 1
            continue
        if messages in prompts:
            skipped["the same problem as an earlier row"] += 1
            continue
        number = f"{table.stem}-{row_number}"
        name = str(row["id"]) if row.get("id") not in (None, "") else number
        if name in ids:
            name = number
        ids.add(name)
        prompts[messages] = Prompt(name, messages, answer)
    if row_number < 0:
        raise UserError(f"{table.name} has no rows: give a data set or split that has some")
    if not prompts:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise UserError(
            f"{table.name} has no usable row in columns {problem_column!r} and {answer_column!r} ({reasons}): "
            "set data.problem_column and data.answer_column to others"
        )
    return PromptSet(tuple(prompts.values()), dict(skipped))


def split_held_out(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(the rest, `count` prompts drawn by `seed`), disjoint, both in the order given.

    Raises UserError where nothing would be left to train on.
    """
    if count >= len(prompts):
        raise UserError(
            f"{count} prompts are to be held out and there are only {len(prompts)}: lower evaluation.prompts, or give "
            "evaluation.data"
        )
    chosen = set(random.Random(seed).sample(range(len(prompts)), count))
    held_out = tuple(p for i, p in enumerate(prompts) if i in chosen)
    return tuple(p for i, p in enumerate(prompts) if i not in chosen), held_out


# ------------------------------------------------------------------------------------------------------- sources


def _open(data: DataSettings) -> _Table:
    path = Path(data.source)
    if data.source == "tiny":
        return _tiny(data.split)
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


def _tiny(split: str) -> _Table:
    try:
        chosen = problems(split)
    except ValueError as error:
        raise UserError(f"data.split: {error}") from None
    rows = [{"problem": problem.prompt, "answer": str(problem.answer)} for problem in chosen]
    return _Table("the built-in task", f"tiny-{split}", ("problem", "answer"), rows)


def _file(path: Path) -> _Table:
    readers = {".parquet": _parquet, ".csv": _csv, ".json": _json, ".jsonl": _json}
    try:
        columns, rows = readers[path.suffix.lower()](path)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        # pyarrow's errors are ValueErrors or OSErrors; only the first line is for people.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data file {path} cannot be read ({reason}): check that it is a {path.suffix} file"
        ) from None
    return _Table(str(path), path.stem, columns, rows)


def _parquet(path: Path) -> tuple[list[str], Iterator[dict]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    # Batch by batch: DAPO-Math-17k repeats itself to 1.8 million rows, far larger as Python objects than in Arrow.
    return _arrow_columns(table.schema), (row for batch in table.to_batches(1_000) for row in batch.to_pylist())


def _csv(path: Path) -> tuple[list[str], list[dict]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = list(reader)
    return list(reader.fieldnames or ()), rows


def _json(path: Path) -> tuple[list[str], list[dict]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        numbered = list(enumerate(json.loads(text), 1))
        what = "entry"
    else:
        numbered, what = [], "line"
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{what} {number} is not an object with columns")
    rows = [row for _, row in numbered]
    return list(dict.fromkeys(name for row in rows for name in _dotted(row))), rows


def _hub(data: DataSettings) -> _Table:
    import datasets

    named = " ".join(filter(None, (data.source, data.config)))
    try:
        rows = datasets.load_dataset(data.source, data.config, split=data.split, revision=data.revision)
        columns = _arrow_columns(rows.features.arrow_schema)
    except Exception as error:
        # Hub and builder errors come from many libraries, with no common base class.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"the hub data set {named!r}, split {data.split!r}, cannot be loaded ({type(error).__name__}: {reason}): "
            "check data.source, data.config, data.split and the connection, or give a local file"
        ) from None
    return _Table(f"the data set {named}", data.source.rsplit("/", 1)[-1], columns, rows)


def _arrow_columns(schema: Any) -> list[str]:
    names = []
    for field in schema:
        names.append(field.name)
        if hasattr(field.type, "fields") and not str(field.type).startswith(("list", "large_list", "map")):
            names += [f"{field.name}.{below}" for below in _arrow_columns(field.type)]
    return names


def _dotted(row: dict, prefix: str = "") -> Iterator[str]:
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


# ------------------------------------------------------------------------------------------------ columns and rows


def _column(table: _Table, wanted: str | None, usual: Sequence[str], setting: str) -> str:
    known = list(table.columns)
    if not known:
        raise UserError(f"{table.name} has no rows: give a data set or split that has some")
    if wanted is None:
        found = next((name for name in usual if name in known), None)
        if found is None:
            raise UserError(
                f"{table.name} has none of the columns {', '.join(usual)}: set data.{setting} to one of "
                f"{', '.join(known)}"
            )
        return found
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{table.name} has no column {wanted!r} (data.{setting}); it has {', '.join(known)}{hint}")
    return wanted


def _value(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _messages(value: Any, system_prompt: str | None) -> tuple[tuple[str, str], ...]:
    if value is None or value == "" or value == []:
        raise _Unusable("no problem")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise _Unusable("the problem is neither text nor a chat")
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise _Unusable("the problem is neither text nor a chat")
        messages.append((role, content))
    if messages[-1][0] != "user":
        raise _Unusable("the chat does not end with the user")
    if not messages[-1][1].strip():
        raise _Unusable("no problem")
    if system_prompt is not None and all(role != "system" for role, _ in messages):
        messages.insert(0, ("system", system_prompt))
    return tuple(messages)


def _answer(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is None or value == [] or (isinstance(value, float) and not math.isfinite(value)):
        raise _Unusable("no answer")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise _Unusable("the answer is neither text nor a number")
    if finals := _FINAL.findall(value):
        value = finals[-1].strip()
        if _GROUPED.fullmatch(value):
            value = value.replace(",", "")
    value = (boxed_answer(value) or value).strip()
    if not value:
        raise _Unusable("no answer")
    if len(value) > LONGEST_ANSWER:
        raise _Unusable(f"the answer is longer than {LONGEST_ANSWER:,} characters")
    return value
