"""The table of completions that a tracker is sent, by hand and as TensorBoard reads it."""

from __future__ import annotations

import json

import pytest
import torch

from hapo_lite.cli import run_command
from hapo_lite.records import Completion, EncodedPrompt, Graded, Prompt, Score
from hapo_lite.train.__main__ import main
from hapo_lite.train.trackers import Table
from tests.conftest import TINY


def completion(index, text, truncated=False):
    prompt = Prompt(f"p{index}", (("system", "Be brief."), ("user", "a|b?")), "3")
    ids = torch.tensor([5, 6, 2])
    blank = torch.zeros(3)
    return Completion(EncodedPrompt(index, prompt, (1, 2)), 0, ids, text, truncated, blank, blank, blank, blank)


GRADED = Graded(
    [completion(0, "<think>1\n2"), completion(0, "3"), completion(0, "4"), completion(1, "\\boxed{*3*}", True)],
    [
        Score(0.25, False, "unparseable", None, {"correct": 0.0, "boxed": 0.5}),
        Score(1.0, True, "correct", "3", {"correct": 1.0, "boxed": 0.0}),
        Score(0.0, False, "wrong", "4", {"correct": 0.0, "boxed": 0.0}),
        Score(1.5, True, "correct", "3", {"correct": 1.0, "boxed": 1.0}),
    ],
)


def test_a_row_has_what_was_asked_written_and_rewarded():
    """First from each group one right and one wrong completion: the third is a second wrong one."""
    table = Table.of("completions/training", GRADED, 3)
    assert table.columns == (
        *("prompt", "completion", "gold answer", "answer", "outcome", "reward", "tokens", "cut off"),
        *("boxed", "correct"),
    )
    asked = "system: Be brief.\n\nuser: a|b?"
    assert table.rows == (
        (asked, "<think>1\n2", "3", "", "unparseable", 0.25, 3, False, 0.5, 0.0),
        (asked, "3", "3", "3", "correct", 1.0, 3, False, 0.0, 1.0),
        (asked, "\\boxed{*3*}", "3", "3", "correct", 1.5, 3, True, 1.0, 1.0),
    )
    assert Table.of("completions/training", GRADED, 2).rows == table.rows[:2]


def test_markdown_keeps_a_cell_in_its_cell():
    """Rows are lines and cells end at bars, so neither may stand in a text; nor what HTML and Markdown would read."""
    [head, rule, *rows] = Table.of("completions/training", GRADED, 3).markdown().splitlines()
    assert len(rows) == 3 and all(line.count("|") == 11 for line in (head, rule, *rows))
    assert "&#60;think&#62;1<br>2" in rows[0] and "user: a&#124;b?" in rows[0] and "| 0.25 |" in rows[0]
    assert "&#92;boxed{&#42;3&#42;}" in rows[2]


@pytest.mark.parametrize("rows", [3, 0])
def test_the_tables_of_a_run_reach_tensorboard(tmp_path, rows):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = [
        f"output_dir={tmp_path}",
        "data.limit=32",
        "evaluation.prompts=2",
        "evaluation.samples=2",
        "training.iterations=1",
        "rollout.prompts_per_iteration=4",
        "rollout.completions_per_prompt=4",
        "reward.workers=1",
        "logging.progress=false",
        "logging.report_to=tensorboard",
        f"logging.table_rows={rows}",
    ]
    assert run_command(main, [str(TINY), *settings]) == 0
    [events] = (tmp_path / "tiny_cpu" / "hapo_lite").glob("events.*")
    found = event_accumulator.EventAccumulator(str(events)).Reload()
    tables = [tag for tag in found.Tags()["tensors"] if tag.startswith("completions/")]
    if not rows:
        assert not tables
        return
    assert sorted(tables) == ["completions/evaluation/text_summary", "completions/training/text_summary"]
    steps = [event.step for event in found.Tensors("completions/evaluation/text_summary")]
    assert steps == [0, 1] and [e.step for e in found.Tensors("completions/training/text_summary")] == [1]
    [event] = found.Tensors("completions/training/text_summary")
    [text] = event.tensor_proto.string_val
    lines = text.decode().splitlines()
    assert 3 <= len(lines) <= 2 + rows and lines[0].startswith("| prompt | completion | gold answer |")
    traced = json.loads((tmp_path / "tiny_cpu" / "traces" / "000001.jsonl").read_text().splitlines()[0])
    assert f"| {traced['gold']} |" in lines[2] and f"| {traced['outcome']} |" in lines[2]
