"""The recorded group that the page opens on, and the program that records it.

    python -m hapo_lite.inspect.example hapo_lite/inspect/example.jsonl

The bundled model answers one problem eight times. The columns of the update are those of an iteration's first update,
in which every ratio is 1. Axes: G completions of the group.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import assign_credit
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import TokenSignals, fit_signal
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.model.policy import Policy
from hapo_lite.runs.files import replace_text
from hapo_lite.runs.trace import Trace, read_traces, trace_line
from hapo_lite.tasks.verify import grade

FILE = Path(__file__).with_name("example.jsonl")
PROBLEM = "9*7+4=?"
GOLD = "67"
GROUP = 8
LONGEST = 64
"""Tokens of an answer at most."""
DIGITS = 5
"""Significant digits that are kept, one more than the page shows."""
LEAST_SHARE = 0.01
"""Alternatives with a lower probability are left out of the file."""


def load() -> list[Trace]:
    """The recorded group, G traces."""
    return read_traces(FILE)


def without_temperature(trace: Trace, method: Method) -> Trace:
    """A recorded completion as `method`, which has no adaptive temperature, treats its tokens at the first update.

    The tokens and the advantage of the completion are the recorded ones. Raises ValueError for another method, and for
    a completion without a signal.
    """
    if method.adaptive_temperature or trace.signal is None:
        raise ValueError("a method without adaptive temperature and a recorded signal are needed")
    found = _columns(trace, trace.signal, trace.tokens["advantage"][0], method)
    # With as many digits as the advantage has in the file, a credit that is equal to it is written alike.
    columns = {name: _short(values) for name, values in found.items()}
    # At the base temperature the model gives each alternative its probability at the base temperature.
    columns["temperature"] = [1.0] * len(columns["h"])
    columns["alternatives"] = [[(text, base, base) for text, base, _ in row] for row in trace.tokens["alternatives"]]
    return dataclasses.replace(trace, tokens=trace.tokens | columns)


def record() -> list[Trace]:
    """Let the bundled model answer the problem, G traces.

    A first set of answers at the base temperature gives the signal, as an iteration gives it to the next one.
    """
    policy = ModelShelf().get("tiny")
    before = _answers(policy, PRESETS["dapo"], None)
    sampling_signal = fit_signal(Method(), _flat(before))
    traces = [_graded(trace) for trace in _answers(policy, Method(), sampling_signal)]
    signal = fit_signal(Method(), _flat(traces))
    rewards = torch.tensor([trace.reward for trace in traces])
    lengths = torch.tensor([len(trace.tokens["id"]) for trace in traces])
    advantage = group_advantage(rewards, lengths, torch.zeros(GROUP), Method().advantage_level)
    right = sum(trace.outcome == "correct" for trace in traces)
    return [
        dataclasses.replace(
            _updated(trace, signal, float(own)), sample=sample, group_size=GROUP, group_correct=right, gold=GOLD
        )
        for sample, (trace, own) in enumerate(zip(traces, advantage, strict=True))
    ]


def _answers(policy: Policy, method: Method, signal: EntropySignal | None) -> list[Trace]:
    """One answer for each seed from 0 to G - 1. signal: that of an adaptive temperature."""
    answers = []
    for seed in range(GROUP):
        *_, last = generate(
            policy, GenerationSettings(PROBLEM, method, max_new_tokens=LONGEST, seed=seed, signal=signal)
        )
        answers.append(last.trace)
    return answers


def _graded(trace: Trace) -> Trace:
    graded = grade(trace.text, GOLD)
    return dataclasses.replace(trace, reward=float(graded.correct), outcome=graded.outcome)


def _updated(trace: Trace, signal: EntropySignal, advantage: float) -> Trace:
    """The trace with the columns of an update in which every ratio is 1."""
    columns = _columns(trace, signal, advantage, Method())
    kept = {name: _short(values) for name, values in (trace.tokens | columns).items()}
    kept["alternatives"] = [
        [(text, *_short(shares)) for text, *shares in choices if shares[0] >= LEAST_SHARE]
        for choices in trace.tokens["alternatives"]
    ]
    return dataclasses.replace(trace, stage="recorded", tokens=kept, signal=signal)


def _columns(trace: Trace, signal: EntropySignal, advantage: float, method: Method) -> dict[str, list[Any]]:
    """The columns that an update under the method records of a completion, with a ratio of 1 for every token."""
    entropy = torch.tensor(trace.tokens["entropy"])
    tokens = TokenSignals.of_one(method, signal, entropy)
    ratio = torch.ones(1, len(entropy))
    credit = assign_credit(method, torch.tensor([advantage]), tokens, ratio)
    return {
        "h": tokens.h[0].tolist(),
        "ratio": ratio[0].tolist(),
        "advantage": [advantage] * len(entropy),
        "credit": credit.advantage[0].tolist(),
        "lower": credit.lower[0].tolist(),
        "upper": credit.upper[0].tolist(),
        "clipped": [""] * len(entropy),
    }


def _flat(traces: Sequence[Trace]) -> Tensor:
    return torch.tensor([entropy for trace in traces for entropy in trace.tokens["entropy"]])


def _short(values: Sequence[object]) -> list[object]:
    return [float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write")
    out = parser.parse_args().out
    traces = record()
    replace_text(out, "".join(map(trace_line, traces)))
    right = traces[0].group_correct
    print(f"{out}: {GROUP} answers to {PROBLEM}, {right} right, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
