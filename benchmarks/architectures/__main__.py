"""Put a small random model of every causal family of transformers through the commands, and write docs/models.md.

    python -m benchmarks.architectures [FAMILY ...] [--results FILE] [--again] [--page]

A family takes 4 seconds on one idle core. What has been found of a family is a line of the results file; a family
that has a line is not tried again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read as the hub's client is imported

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.architectures.apart import apart
from benchmarks.architectures.changes import NOT_TRIED
from benchmarks.architectures.page import PAGE, page_of
from benchmarks.architectures.small import example_of, families, save_small_model
from benchmarks.architectures.trial import Report, Trial
from hapo_lite.cli import quiet_libraries

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0


def read(path: Path) -> dict[str, Report]:
    """The reports so far, by family. A line that was cut off, or is an older version's, does not count."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            report = Report(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if not report.facts or "unpacked" in report.facts or report.results.get("train") != "ran":
            found[report.family] = report
    return found


def tried(family: str) -> Report:
    """The report of one family, tried in a temporary folder."""
    report = Report(family, example_of(family))
    if family in NOT_TRIED:
        report.results["model"] = "not made"
        return report
    with contextlib.suppress(Exception):  # imported here, the model's code need not be imported in each step
        MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def step() -> int:
            save_small_model(family, folder / "model")
            return 0

        made = apart(step, folder / "log", DEADLINE_S)
        if made.code != 0:
            report.results["model"] = "not made"
            report.sentences["model"] = made.text.strip()[-1500:]
            return report
        return Trial(folder, lambda step: apart(step, folder / "log", DEADLINE_S)).run(report)


def headline(report: Report) -> str:
    """The line that is printed for a family."""
    results = " ".join(f"{command} {result}" for command, result in report.results.items())
    facts = " ".join(str(report.facts[name]) for name in ("cache", "gap") if name in report.facts)
    return " | ".join(part for part in (results, facts, " ".join(report.settings)) if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="types of models; without them all")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "architectures.jsonl")
    parser.add_argument("--again", action="store_true", help="try families that have been tried")
    parser.add_argument("--page", action="store_true", help="write docs/models.md from what has been found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    known = read(arguments.results)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    wanted = arguments.families or families()
    left = [family for family in wanted if arguments.again or family not in known]
    for number, family in enumerate(left, 1):
        started = time.monotonic()
        known[family] = tried(family)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(known[family].as_json() + "\n")
        seconds = time.monotonic() - started
        print(f"{number}/{len(left)} {family} ({seconds:.0f} s): {headline(known[family])}", flush=True)
    if arguments.page or not arguments.families:
        PAGE.write_text(page_of([known[family] for family in families() if family in known]), encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    sys.exit(main())
