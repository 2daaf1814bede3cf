"""One generation, or one fork, of the inspector on the device, from the adapter of a run.

python -m benchmarks.gpu_inspector generate|fork RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hapo_lite.algo.methods import PRESETS
from hapo_lite.cli import run_command


def main(argv: list[str] | None = None) -> None:
    """Print where it ran and what was written. Raises UserError if the run has no traces, or nothing was written."""
    from hapo_lite.errors import UserError
    from hapo_lite.inspect.fork import ForkSettings, fork
    from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
    from hapo_lite.rollout.sampling import AdaptiveTemperature
    from hapo_lite.runs.trace import read_traces

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generate", "fork"))
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args(argv)
    policy = ModelShelf().get("tiny", str(arguments.run / "adapter"))
    if arguments.what == "generate":
        settings = GenerationSettings("9*7+4=?", method=PRESETS["hapo"], max_new_tokens=32)
        *_, last = generate(policy, settings)
        print(f"{policy.device}: {last.trace.text}")
        if not last.trace.text:
            raise UserError("the generation wrote nothing")
        return
    files = sorted((arguments.run / "traces").glob("*.jsonl"))
    traces = [trace for path in files for trace in read_traces(path) if len(trace.tokens["id"]) > 2]
    if not traces:
        raise UserError(f"{arguments.run} has no trace of a completion that could be forked")
    *_, whole = fork(policy, traces[-1], ForkSettings(1, continuations=8, tokens=32), AdaptiveTemperature(None))
    print(f"{policy.device}: {[(branch.text, len(branch.continuations)) for branch in whole.branches]}")
    if not all(branch.ends or len(branch.continuations) == 8 for branch in whole.branches):
        raise UserError("the fork left continuations out")


if __name__ == "__main__":
    sys.exit(run_command(main))
