"""Seconds and memory to get from a file of a million rows to the first prompts of an epoch.

    python benchmarks/data.py                      # 1,000,000 rows: JSON Lines, parquet, parquet in one row group
    python benchmarks/data.py --rows 100000

Problems are as long as MATH's (log-normal, median 150 characters, a hundredth above 1,000). Each file is read in a
process of its own: load_prompts, 64 held out, a LazyPrompts with the bundled tokenizer, 256 prompts from PromptStream.
Memory is counted beyond that of the imported program.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

WORDS = ("find", "the", "value", "of", "x", "such", "that", "integers", "prime", "factors", "equal", "root")


def texts(rows: int) -> list[str]:
    """Distinct problems, of the lengths that the docstring of this file gives."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(150), 0.8, rows)).astype(int)
    filler = " ".join(rng.choice(WORDS, 20_000))
    starts = rng.integers(0, len(filler) // 2, rows)
    return [f"({i}) {filler[s : s + n]}" for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]


def write(folder: Path, rows: int) -> list[Path]:
    """Write the same rows to a file of each kind."""
    problems = texts(rows)
    answers = [str(i % 1000) for i in range(rows)]
    paths = [folder / "rows.jsonl", folder / "rows.parquet", folder / "one-group.parquet"]
    with paths[0].open("w", encoding="utf-8") as file:
        for problem, answer in zip(problems, answers, strict=True):
            file.write(json.dumps({"problem": problem, "answer": answer}) + "\n")
    table = pa.table({"problem": problems, "answer": answers})
    pq.write_table(table, paths[1], row_group_size=100_000)
    pq.write_table(table, paths[2], row_group_size=rows)
    return paths


def measure(path: Path) -> None:
    """Read a file, and print a line with the time and memory it took."""
    import transformers
    from transformers import AutoTokenizer

    from hapo_lite.model.origins import TINY_MODEL
    from hapo_lite.recipe import DataSettings
    from hapo_lite.tasks.data import load_prompts, split_held_out
    from hapo_lite.tasks.stream import LazyPrompts, PromptStream

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    transformers.utils.logging.set_verbosity_error()
    tokenizer.encode("warm")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS:")
    started = time.perf_counter()
    train, held_out = split_held_out(load_prompts(DataSettings(source=str(path))).prompts, 64, seed=0)
    loaded = time.perf_counter()
    lazy = LazyPrompts(train, lambda p: tokenizer.encode(p.messages[-1][1]), 4096)
    taken = PromptStream(lazy, seed=0).take(0, 256)
    took = time.perf_counter()
    print(
        f"{path.name:18} {path.stat().st_size / 2**20:5.0f} MiB: {len(train) + len(held_out):,} prompts in "
        f"{loaded - started:.1f} s, the first {len(taken)} in {took - loaded:.2f} s; {before:.0f} MiB before, "
        f"{resident('VmHWM:') - before:+.0f} at the peak, {resident('VmRSS:') - before:+.0f} afterwards",
        flush=True,
    )


def resident(name: str) -> float:
    """The memory in one line of /proc/self/status, MiB."""
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to keep the files; those that are there are used")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        sys.exit()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        paths = sorted(folder.glob("*rows*.*")) + sorted(folder.glob("one-group.*"))
        for path in paths or write(folder, arguments.rows):
            subprocess.run([sys.executable, __file__, "--measure", path], check=True)
