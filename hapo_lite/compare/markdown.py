"""report.md: the findings, the tables and the caveats as Markdown, to paste into an issue or a page."""

from __future__ import annotations

from collections.abc import Sequence

from hapo_lite.compare.numbers import Numbers
from hapo_lite.compare.tables import Cell, Table, difference_table, final_table
from hapo_lite.compare.words import caveats, findings


def markdown(numbers: Numbers, planned: int, missing: Sequence[str]) -> str:
    """The text of report.md. planned: the number of runs; missing: a line for each that is not complete."""
    comparison = numbers.comparison
    parts = [f"# {comparison.name}", comparison.about]
    if missing:
        parts.append(f"Not complete, and not in this report: {len(missing)} of {planned} runs ({', '.join(missing)}).")
    parts.append("\n".join(f"- {sentence}" for sentence in findings(numbers)))
    parts += ["## At the end", *_table(final_table(numbers))]
    if numbers.others:
        parts += [f"## Differences to {comparison.base}", *_table(difference_table(numbers))]
    parts += caveats(numbers)
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> list[str]:
    """The table and its caption, as paragraphs."""
    rows = [[arm, *map(_cell, cells)] for arm, cells in table.rows]
    lines = [_row(table.heads), _row(["---"] * len(table.heads)), *map(_row, rows)]
    return ["\n".join(lines), table.caption]


def _cell(cell: Cell) -> str:
    """A cell in one line; bold where it has a verdict."""
    text = f"{cell.text} ({'; '.join(cell.below)})" if cell.below else cell.text
    return f"**{text}** {cell.verdict}" if cell.verdict else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
