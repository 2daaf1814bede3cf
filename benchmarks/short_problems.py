"""GSM8K's short problems, for the runs of docs/results.md, which have to fit a CPU.

    python benchmarks/short_problems.py OUT [--data DATA]
    python benchmarks/short_problems.py OUT --rates runs/NAME/probe/pass_rates.jsonl

A problem is short if its worked solution has at most two calculator steps (`<<`). The first command writes to OUT:
train.parquet and test.parquet with the short problems of each split, and train.parquet again in two parts, so that no
problem of reinforcement learning was seen with its solution: warm_start.parquet, and learn.parquet with the last
LEARN. DATA is a folder with gsm8k_train.parquet and gsm8k_test.parquet; without it they come from the hub. The second
command reads a probe of learn.parquet, or of its first problems, and writes learnable.parquet with those that were
solved in 10 to 90 % of the attempts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_dataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.recipe.curriculum import PassRateSettings  # noqa: E402
from hapo_lite.tasks.pass_rates import read_pass_rates  # noqa: E402

STEPS = 2
LEARN = 800


def short(split: str, data: Path | None) -> Dataset:
    """The short problems of a split, in their order."""
    if data is None:
        rows = load_dataset("openai/gsm8k", "main", split=split)
    else:
        rows = Dataset.from_parquet(str(data / f"gsm8k_{split}.parquet"))
    return rows.filter(lambda row: row["answer"].count("<<") <= STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="folder with gsm8k_train.parquet and gsm8k_test.parquet")
    parser.add_argument("--rates", type=Path, help="pass_rates.jsonl of a probe of learn.parquet")
    args = parser.parse_args()
    disable_progress_bars()
    if args.rates is None:
        train = short("train", args.data)
        last = len(train) - LEARN
        parts = {
            "train": train,
            "test": short("test", args.data),
            "warm_start": train.select(range(last)),
            "learn": train.select(range(last, len(train))),
        }
    else:
        low, high = PassRateSettings(file=str(args.rates)).between
        rows = Dataset.from_parquet(str(args.out / "learn.parquet"))
        found = read_pass_rates(args.rates)
        probed = [i for i in range(len(rows)) if f"learn-{i}" in found]
        parts = {"learnable": rows.select([i for i in probed if low <= found[f"learn-{i}"].rate <= high])}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        rows.to_parquet(str(args.out / f"{name}.parquet"))
        print(f"{args.out / name}.parquet: {len(rows):,} problems")


if __name__ == "__main__":
    main()
