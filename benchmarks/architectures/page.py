"""docs/models.md, written from what has been found of the families."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers

from benchmarks.architectures.changes import CHOOSING_KEYS, NOT_TRIED
from benchmarks.architectures.trial import CLOSE, Report

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SHOWN = 5
"""Kinds of layers that a cell names, at most."""
HEADER = """\
# Which models work?

Every family of models for which transformers has a causal language model was tried as a small random model: one
iteration of training on a 4-bit base, then evaluation, a merged export that is read back, and a prediction of memory.
{trains} families train, {limited} of them with short rows alone, {refused} are refused with a sentence that says why,
and {left} could not be made small. A small model has its family's layers, but says nothing about memory, speed or
learning at the size of a real one.

    make architectures                                    # all families, a quarter of an hour; writes this page
    python -m benchmarks.architectures llama mamba2       # some of them

Machine: one thread of {machine}, torch {torch}, transformers {transformers}, peft {peft} and
bitsandbytes {bitsandbytes}.
{tracebacks} ended in a traceback.
"""
TRAINS = """\
## Families that train

For each of these, the [check before training](engines.md#the-check-before-training) passed, and the sampler's
log-probabilities equal the trainer's to {close:g} nats in fp32, with a trained adapter that was perturbed where
training had moved it, prompts of 3 to 41 tokens in one batch, and rows that end at different steps. {most:.0e} is the
largest difference found.

- **In 4 bits**: which layers that multiply by a matrix bitsandbytes packs. "all but experts": experts that are stacked
  in one tensor stay in 16 bits. "none": `model.quantization=nf4` leaves this family as it is. "not in 4 bits": the
  family trains with `model.quantization=none` alone.
- **No adapter**: kinds of layers that have an adapter which the iteration did not move, because the text does not pass
  through them (vision and audio parts) or because the family's code reads their weight without calling them.
- **Cache**: `fixed` is the fast [decoding step](engines.md#a-decoding-step), `growing` the cache that transformers
  makes. The engine finds out by itself.
- **Set** is a setting that the family needs; without it the run stops, and its sentence names the setting. A limit
  on rows is not enforced: see [below](#what-the-table-does-not-show).

"""
REFUSED = """\
## Families that are refused

MODEL stands for `model.name`, and X for a number that differs.

"""
LEFT = """\
## Families that were not tried

"""
LIMITS = """\
## What the table does not show

- Layers that choose which keys to read (A.X-K2, DeepSeek V3.2, GLM-5, HunYuan V4) train right only while no row has
  more tokens than the config's `index_topk`. With longer rows, sampler and trainer differed by 0.3 to 2 nats, since
  transformers 5.17 computes other numbers token by token than in one pass. The check before training has short rows and
  does not see that; `sampler/gap_mean` does. In the table `index_topk` is 512, more than any row has.
- On a GPU, state-space models run other kernels if `mamba-ssm` or `flash-linear-attention` is installed. They were not
  installed here. The check before training would show a difference.
- Encoder-decoders (T5, BART, Whisper) have no place here: their decoders alone are refused, or train without what they
  would read.
"""


def page_of(reports: Sequence[Report]) -> str:
    """The whole page."""
    trains = [r for r in reports if r.trains]
    refused = [r for r in reports if r.results.get("train") == "refused"]
    left = [r for r in reports if "model" in r.results]
    broken = [
        f"{r.family} {c}" for r in reports for c, result in r.results.items() if result in ("traceback", "killed")
    ]
    broken += [f"{r.family} (sampler and trainer differ)" for r in reports if r not in trains + refused + left]
    header = HEADER.format(
        trains=len(trains),
        limited=sum(r.family in CHOOSING_KEYS for r in trains),
        refused=len(refused),
        left=len(left),
        machine=machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        bitsandbytes=bitsandbytes.__version__,
        tracebacks=f"Commands of {', '.join(broken)}" if broken else "No command",
    )
    most = max(r.facts["gap"] for r in trains)
    parts = [header, TRAINS.format(close=CLOSE, most=most) + table_of_trained(trains)]
    parts += [REFUSED + table_of_refused(refused), LEFT + table_of_left(left), LIMITS]
    return "\n".join(parts)


def machine() -> str:
    """The processor, in words."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def table_of_trained(reports: Sequence[Report]) -> str:
    """A row for each family: an example, what it needs, its layers, its cache, and the other commands."""
    rows = [
        "| family | example | set | in 4 bits | no adapter | cache | evaluate | export | preflight |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for report in reports:
        needed = [f"`{setting}`" for setting in report.settings]
        if report.family in CHOOSING_KEYS:
            needed.append("rows up to `index_topk`")
        cells = [f"`{report.family}`", report.example, " ".join(needed), packed(report)]
        cells += [few(report.facts["unmoved"]), report.facts["cache"]]
        for command in ("evaluate", "export", "preflight"):
            result = report.results.get(command, "")
            cells.append("yes" if result == "ran" else result)
            if result == "refused":
                notes.append((command, plain(report.sentences[command]), report.family))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", *sentences(notes)])


def sentences(notes: Sequence[tuple[str, str, str]]) -> list[str]:
    """A line for each sentence that a command other than `train` was refused with, with its families."""
    families: dict[tuple[str, str], list[str]] = {}
    for command, sentence, family in notes:
        # The place and the words of the error differ from family to family.
        short = re.sub(r" \([\w.]+\.py:\d+: .*\);", ";", sentence)
        families.setdefault((command, short), []).append(f"`{family}`")
    return [f"- {command} of {', '.join(named)}: {sentence}" for (command, sentence), named in families.items()]


def packed(report: Report) -> str:
    """The kinds of layers in 4 bits, in a few words."""
    if "model.quantization=none" in report.settings:
        return "not in 4 bits"
    if not report.facts["packed"]:
        return "none"
    return f"all but {few(report.facts['unpacked'])}" if report.facts["unpacked"] else "all"


def few(kinds: Sequence[str]) -> str:
    """The first kinds, and how many there are besides."""
    return ", ".join(kinds[:SHOWN]) + (f" and {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else "")


def table_of_refused(reports: Sequence[Report]) -> str:
    """A row for each sentence: its families, each with an example."""
    families: dict[str, list[str]] = {}
    for report in reports:
        sentence = re.sub(r"\b\d+(\.\d+)?(e-?\d+)?(?= nats\b|%)|\d\.\de-\d+", "X", plain(report.sentences["train"]))
        families.setdefault(sentence, []).append(f"`{report.family}` ({report.example})")
    rows = ["| sentence | families |", "|---|---|"]
    rows += [f"| {sentence} | {', '.join(named)} |" for sentence, named in families.items()]
    return "\n".join([*rows, ""])


def table_of_left(reports: Sequence[Report]) -> str:
    """A row for each family: an example and the reason."""
    rows = ["| family | example | reason |", "|---|---|---|"]
    for report in reports:
        rows.append(f"| `{report.family}` | {report.example} | {NOT_TRIED.get(report.family, report.problem)} |")
    return "\n".join([*rows, ""])


def plain(sentence: str) -> str:
    """A sentence without what differs from run to run, fit for a table."""
    sentence = re.sub(r"\S*/model\b", "MODEL", sentence)
    return re.sub(r" \(files [0-9a-f]+\)", "", sentence).replace("|", "\\|").replace("\n", " ")
