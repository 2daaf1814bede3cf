"""What a tracker (TensorBoard, wandb, trackio) is sent: an iteration's numbers, and a table of a few completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from hapo_lite.records import Graded
from hapo_lite.train.traces import choose_traced

TRAINING, EVALUATION = "completions/training", "completions/evaluation"
"""The names of the tables."""
COLUMNS = ("prompt", "completion", "gold answer", "answer", "outcome", "reward", "tokens", "cut off")

ENTITIES = str.maketrans({mark: f"&#{ord(mark)};" for mark in "&<>|\\`*_[]#~$"} | {"\n": "<br>"})
"""By character: what stands for it in a cell of Markdown."""

Cell = str | float | int | bool


@dataclass(frozen=True)
class Table:
    """A table of completions. rows: one for each completion, with a cell for each column."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, name: str, graded: Graded, count: int) -> Table:
        """Up to `count` completions, chosen as those of the traces: first one right and one wrong from each group.

        Each reward of `reward.functions` has a column of its own, before its weight.
        """
        chosen = choose_traced(graded, count)
        rewards = sorted({reward for i in chosen for reward in graded.scores[i].rewards})
        return cls(name, (*COLUMNS, *rewards), tuple(_row(graded, i, rewards) for i in chosen))

    def markdown(self) -> str:
        """The table for TensorBoard, which renders a text as Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _row(graded: Graded, place: int, rewards: Sequence[str]) -> tuple[Cell, ...]:
    completion, score = graded.completions[place], graded.scores[place]
    prompt = completion.prompt.prompt
    return (
        "\n\n".join(f"{role}: {content}" for role, content in prompt.messages),
        completion.text,
        prompt.answer,
        score.answer or "",
        score.outcome,
        score.reward,
        completion.length,
        completion.truncated,
        *(score.rewards[reward] for reward in rewards),
    )


def _cell(value: Cell) -> str:
    """A value on one line, without a character that Markdown or HTML would read as its own."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.translate(ENTITIES)


def send_numbers(accelerator: Accelerator, metrics: Mapping[str, Any], step: int) -> None:
    """Send an iteration's line of metrics.jsonl but for its lists, which trackers do not draw."""
    accelerator.log({key: value for key, value in metrics.items() if not isinstance(value, list)}, step=step)


def send_table(accelerator: Accelerator, tracker: str, table: Table, step: int) -> None:
    """Send a table. tracker: logging.report_to."""
    if tracker == "wandb":
        wandb = cast(WandBTracker, accelerator.get_tracker("wandb"))
        wandb.log_table(table.name, columns=list(table.columns), data=[list(row) for row in table.rows], step=step)
    elif tracker == "trackio":
        import pandas
        import trackio

        frame = pandas.DataFrame(list(table.rows), columns=list(table.columns))
        accelerator.log({table.name: trackio.Table(dataframe=frame)}, step=step)
    else:
        accelerator.log({table.name: table.markdown()}, step=step)
