"""benchmarks/short_problems.py: no problem of reinforcement learning was seen with its solution."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks import short_problems
from hapo_lite.recipe.sections import DataSettings
from hapo_lite.tasks.data import load_prompts
from hapo_lite.tasks.pass_rates import PassRate, write_pass_rates


def solution(number: int) -> str:
    """Solutions with one, two and three calculator steps in turn."""
    return "\n".join(["<<1+1=2>>2"] * (1 + number % 3)) + f"\n#### {number}"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(short_problems, "LEARN", 8)
    for split, count in (("train", 30), ("test", 9)):
        rows = [{"question": f"{split} {number}?", "answer": solution(number)} for number in range(count)]
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"gsm8k_{split}.parquet"))
    run(tmp_path / "out", "--data", tmp_path, monkeypatch=monkeypatch)
    return tmp_path / "out"


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["short_problems.py", *map(str, arguments)])
    short_problems.main()


def questions(path: Path) -> list[str]:
    return [prompt.messages[-1][1] for prompt in load_prompts(DataSettings(source=str(path))).prompts]


def test_the_parts_are_the_short_problems_once_each(made: Path) -> None:
    short = [f"train {number}?" for number in range(30) if number % 3 < 2]
    assert questions(made / "train.parquet") == short
    assert questions(made / "warm_start.parquet") == short[:-8]
    assert questions(made / "learn.parquet") == short[-8:]
    assert questions(made / "test.parquet") == [f"test {number}?" for number in range(9) if number % 3 < 2]


def test_a_probe_chooses_the_learnable(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ids that the kit gives to the prompts of learn.parquet."""
    prompts = load_prompts(DataSettings(source=str(made / "learn.parquet"))).prompts
    rates = [PassRate(prompt.id, "", right, 8, 10.0, 0) for right, prompt in enumerate(prompts[:-1])]
    write_pass_rates(made / "pass_rates.jsonl", {}, rates)
    run(made, "--rates", made / "pass_rates.jsonl", monkeypatch=monkeypatch)
    # 1 to 6 of 8 attempts were right: the first prompt, with none, is out, as is the last, which was not probed.
    assert questions(made / "learnable.parquet") == questions(made / "learn.parquet")[1:-1]
