"""Data sets become prompts: rows of any columns, from any source, are read one at a time into one record."""

from __future__ import annotations

import decimal
import difflib
import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hapo_lite.errors import UserError, counted
from hapo_lite.recipe import DataSettings
from hapo_lite.records import Prompt
from hapo_lite.tasks.solutions import worked_solution
from hapo_lite.tasks.sources import Table, open_table
from hapo_lite.tasks.store import PromptStore, Selection
from hapo_lite.tasks.verify import LONGEST_ANSWER, marked_answer

CHARACTERS_PER_TOKEN = 32
"""A problem with more characters for each token of data.max_prompt_tokens is too long; it is not tokenised."""
PROBLEM_COLUMNS = ("prompt", "problem", "question")
ARGUMENTS = ("prompts", "completions", "answers", "token_counts", "truncated", "iteration")
"""What a reward function can ask for beside columns: a list by completion each, and the iteration's number."""
LONGEST_NAME = 200
"""Most characters of an id."""
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "solution")
SOLUTION_COLUMNS = ("solution", "answer")

_FINAL = re.compile(r"####[ \t]*([^\n]*)")
_GROUPED = re.compile(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", re.ASCII)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of the data. skipped: the number of rows that were left out, by reason.

    first: the first of these rows in words, by reason.
    """

    prompts: Sequence[Prompt]
    skipped: Mapping[str, int]
    first: Mapping[str, str]

    def left_out(self) -> list[str]:
        """A sentence for each reason, with the first row that was left out for it."""
        return [
            f"{counted(count, 'row')} left out: {reason} ({'' if count == 1 else 'first in '}{self.first[reason]})"
            for reason, count in self.skipped.items()
        ]


@dataclass(frozen=True)
class Column:
    """A column of the data that a reward function asks for. by: the function, in words.

    required: without the column there is an error; otherwise the column is read if the data has it.
    """

    name: str
    by: str
    required: bool


class _Unusable(Exception):
    """A row is left out, for the reason that this error carries."""


def load_prompts(data: DataSettings, columns: Sequence[Column] = (), solutions: bool = False) -> PromptSet:
    """Read `data.source`. `data.limit` counts prompts that are kept, not rows. columns: kept with the prompts.

    solutions: read the worked solutions too. Rows without one are kept, so that the prompts are the same ones.

    A row is left out, and counted, if its problem or answer is missing or unusable, or if an earlier row has the same
    problem. Raises UserError if the source, its columns or all of its rows are unusable, or if solutions are asked for
    and there are none.
    """
    table = open_table(data)
    problem_column = _column(table, data.problem_column, PROBLEM_COLUMNS, "problem_column")
    answer_column = _column(table, data.answer_column, ANSWER_COLUMNS, "answer_column")
    further = _further(table, columns)
    solution_column = _solution_column(table, data) if solutions else None
    needed = tuple(filter(None, (problem_column, answer_column, "id", solution_column, *further.values())))
    prompts = PromptStore(table.origin)
    worked = 0
    seen: set[int] = set()
    ids: set[int] = set()
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}
    row_number = -1
    for row_number, row in enumerate(table.read(needed)):
        if len(prompts) == data.limit:
            break
        try:
            messages = _messages(_value(row, problem_column), data)
            problem = _fingerprint(messages)
            if problem in seen:
                raise _Unusable("the same problem as an earlier row")
            name = _name(row.get("id"), f"{table.stem}-{row_number}", ids)
            answer = _answer(_value(row, answer_column))
            solution = worked_solution(_value(row, solution_column), answer) if solution_column else ""
            kept = {asked: row.get(column) for asked, column in further.items()}
            prompts.add(Prompt(name, messages, answer, solution, kept))
            worked += bool(solution)
        except (UnicodeEncodeError, _Unusable) as error:
            reason = str(error) if isinstance(error, _Unusable) else "text that is not Unicode"
            skipped[reason] += 1
            first.setdefault(reason, f"row {row_number + 1:,}{' below the header' if table.header else ''}")
        else:
            seen.add(problem)
            ids.add(_fingerprint(name))
    if row_number < 0:
        raise UserError(f"{table.name} has no rows: give a data set or split that has some")
    if not prompts:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.items())
        raise UserError(
            f"{table.name} has no usable row in columns {problem_column!r} and {answer_column!r} ({reasons}): "
            "set data.problem_column and data.answer_column to others"
        )
    if solution_column and not worked:
        raise UserError(
            f"{table.name} has no worked solutions in column {solution_column!r}, only answers or nothing: set "
            f"data.solution_column to another of {', '.join(table.columns)}"
        )
    return PromptSet(prompts, dict(skipped), first)


def without_problems(prompts: Sequence[Prompt], others: Iterable[Prompt]) -> Sequence[Prompt]:
    """The prompts but for those with a problem of `others`, whatever their ids, answers and system prompts."""
    theirs = {_asked(prompt) for prompt in others}
    places = [i for i, prompt in enumerate(prompts) if _asked(prompt) not in theirs]
    return prompts if len(places) == len(prompts) else Selection(prompts, places)


def split_held_out(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[Sequence[Prompt], tuple[Prompt, ...]]:
    """(the other prompts, `count` prompts drawn by `seed`), both in the order given.

    Raises UserError if nothing would be left to train on.
    """
    if count >= len(prompts):
        raise UserError(
            f"{counted(count, 'prompt')} {'is' if count == 1 else 'are'} to be held out and there are only "
            f"{len(prompts)}: lower evaluation.prompts, or give evaluation.data"
        )
    chosen = set(random.Random(seed).sample(range(len(prompts)), count))
    rest = Selection(prompts, [i for i in range(len(prompts)) if i not in chosen])
    return rest, tuple(prompts[i] for i in sorted(chosen))


# ------------------------------------------------------------------------------------------------ columns and rows


def _column(table: Table, wanted: str | None, usual: Sequence[str], setting: str) -> str:
    """The column that is wanted, else the first usual one that the table has, as the table spells it."""
    known = list(table.columns)
    if not known:
        raise UserError(f"{table.name} has no rows: give a data set or split that has some")
    if wanted is None:
        exact = [name for name in usual if name in known]
        found = next(filter(None, [*exact, *(_spelled(name, known) for name in usual)]), None)
        if found is None:
            header = " (its first line was taken as their names: put a line of names above it if it is a row)"
            raise UserError(
                f"{table.name} has none of the columns {', '.join(usual)}{header if table.header else ''}: set "
                f"data.{setting} to one of {', '.join(known)}"
            )
        return found
    spelled = _spelled(wanted, known)
    if spelled is None:
        close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"{table.name} has no column {wanted!r} (data.{setting}); it has {', '.join(known)}{hint}")
    return spelled


def _spelled(name: str, columns: Sequence[str]) -> str | None:
    """A column as the table spells it: `name` itself, else the first that differs by case and outer spaces alone."""
    if name in columns:
        return name
    plain = name.strip().casefold()
    return next((column for column in columns if column.strip().casefold() == plain), None)


def _further(table: Table, columns: Sequence[Column]) -> dict[str, str]:
    """The columns that the table has, as it spells them, by name. Raises UserError for a required one that it lacks."""
    found = {column.name: _spelled(column.name, table.columns) for column in columns}
    for column in columns:
        if column.required and found[column.name] is None:
            close = difflib.get_close_matches(column.name, [*table.columns, *ARGUMENTS], n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{column.by} asks for {column.name!r}, and {table.name} has no such column; it has "
                f"{', '.join(table.columns)}, and every function can have {', '.join(ARGUMENTS)}{hint}"
            )
    return {name: column for name, column in found.items() if column is not None}


def _solution_column(table: Table, data: DataSettings) -> str:
    return _column(table, data.solution_column, SOLUTION_COLUMNS, "solution_column")


def _value(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _asked(prompt: Prompt) -> int:
    """A hash of the problem: of the chat without system messages."""
    return _fingerprint([message for message in prompt.messages if message[0] != "system"])


def _fingerprint(value: object) -> int:
    """A hash of 64 bits of a text or a chat."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest())


def _name(given: Any, number: str, taken: set[int]) -> str:
    """The row's own id if it is short and not taken, else its number, with a dash for each time that it is taken."""
    name = str(given) if isinstance(given, (str, int)) else ""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or _fingerprint(name) in taken:
        name = number
        while _fingerprint(name) in taken:
            name += "-"
    return name


def _messages(value: Any, data: DataSettings) -> tuple[tuple[str, str], ...]:
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
    most = CHARACTERS_PER_TOKEN * data.max_prompt_tokens
    if sum(len(content) for _, content in messages) > most:
        raise _Unusable(f"longer than {most:,} characters, {CHARACTERS_PER_TOKEN} for each of data.max_prompt_tokens")
    if data.system_prompt is not None and all(role != "system" for role, _ in messages):
        messages.insert(0, ("system", data.system_prompt))
    return tuple(messages)


def _answer(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise _Unusable("the answer is a list of several")
        value = value[0] if value else None
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise _Unusable("no answer")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float, decimal.Decimal)):
        value = str(value)
    if not isinstance(value, str):
        raise _Unusable("the answer is neither text nor a number")
    finals = _FINAL.findall(value)
    if finals:
        value = finals[-1].strip()
        if _GROUPED.fullmatch(value):
            value = value.replace(",", "")
    value = (marked_answer(value) or value).strip()
    if not value:
        raise _Unusable("no answer")
    if len(value) > LONGEST_ANSWER:
        raise _Unusable(f"the answer is longer than {LONGEST_ANSWER:,} characters")
    return value
