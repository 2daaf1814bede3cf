"""Prove that a killed run resumes: `python -m hapo_lite.verify_resume RECIPE [--kills N] [section.key=value ...]`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from hapo_lite.cli import recipe_from, recipe_parser, run_command


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`; None: the arguments of this process.

    Raises ResumeDiffers if a resumed run differs, and UserError if that could not be found out or something else is
    wrong.
    """
    from hapo_lite.errors import UserError
    from hapo_lite.verify_resume.verify import COMMANDS, ResumeDiffers, verify

    parser = recipe_parser(
        "verify_resume",
        "Kill a run at random, resume it, and compare what it leaves with a run that nobody killed. The exit code is 3 "
        "if they differ, and 2 if they could not be compared.",
    )
    parser.add_argument("--kills", type=int, default=20, help="how often it is killed (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="decides where (default 0)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run, under torchrun (default 1)")
    parser.add_argument("--command", choices=COMMANDS, default="train", help="what to run (default train)")
    arguments = parser.parse_args(argv)
    if arguments.kills < 1 or arguments.processes < 1:
        raise UserError("--kills and --processes must be at least 1")
    settings = list(arguments.overrides)
    if arguments.command != "compare":
        recipe = recipe_from(arguments)
        if recipe.model.adapter is not None:
            print(f"every run goes on from the adapter {recipe.model.adapter}", flush=True)
        if arguments.command == "train":
            # Every completion is recorded, so that all prompts and completions are compared.
            completions = recipe.rollout.prompts_per_iteration * recipe.rollout.completions_per_prompt
            settings += [f"logging.traces_per_iteration={completions}", "logging.progress=false"]
    start = [sys.executable]
    if arguments.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.processes)]
    start += ["-m", f"hapo_lite.{arguments.command}", arguments.recipe, *settings]
    folder = Path(tempfile.mkdtemp(prefix="hapo_lite_verify_"))
    findings = verify(start, folder, arguments.kills, arguments.seed)
    if findings.complaints:
        kind = ResumeDiffers if +findings.differing else UserError
        raise kind(
            f"{len(findings.complaints)} problems were found, the first: {findings.complaints[0]}; all "
            f"the runs are in {folder}"
        )
    shutil.rmtree(folder)


def command() -> int:
    """Entry point of `hapo-verify-resume`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
