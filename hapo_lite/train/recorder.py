"""Writes a run's metrics, traces, checkpoints and skipped steps and, at the end, its summary."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

import hapo_lite
from hapo_lite.errors import writing
from hapo_lite.model.adapter import save_adapter
from hapo_lite.recipe import Recipe
from hapo_lite.records import Graded
from hapo_lite.runs.checkpoint import TrainState, save_checkpoint
from hapo_lite.runs.files import file_hash, replace_text, replacing_folder
from hapo_lite.runs.folder import RunFolder
from hapo_lite.runs.lines import timeless
from hapo_lite.runs.skipped import SkippedStep, save_step
from hapo_lite.runs.trace import Trace, salvage_traces, trace_file, write_traces
from hapo_lite.train.collapse import CollapseWatch
from hapo_lite.train.curves import PANELS, ROWS, Panels, closing_table, draw_curves
from hapo_lite.train.loop import Loop
from hapo_lite.train.trackers import EVALUATION, TRAINING, Table, send_numbers, send_table
from hapo_lite.train.verdict import Verdict, judge_run

NOTHING = Graded([], [])
HEADLINE = {"reward/mean": "reward", "entropy/all_mean": "entropy", "eval/accuracy": "avg@n"}
"""Metrics that the progress bar shows, with their labels."""


class Recorder:
    """Writes the files of a run, in its main process. say: prints a sentence for the user.

    headline_of: metrics that the progress bar shows, with their labels. rows: of the closing table. panels: of
    curves.png. graded: the completions of the iteration that is recorded next.
    """

    headline_of: ClassVar[dict[str, str]] = HEADLINE
    rows: ClassVar[Sequence[tuple[str, str]]] = ROWS
    panels: ClassVar[Panels] = PANELS

    def __init__(self, folder: RunFolder, recipe: Recipe, loop: Loop, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.recipe = recipe
        self.loop = loop
        self.say = say
        self.main = loop.accelerator.is_main_process
        self.shown: dict[str, float] = {}
        self.graded = NOTHING
        self.collapse_watch = CollapseWatch()
        if self.main:
            for line in folder.metrics.read():
                self.collapse_watch.see(line)  # These warnings were printed before the run was resumed.

    @property
    def evaluates(self) -> bool:
        """Whether the run measures itself on what it is not trained on."""
        return self.loop.evaluates

    def record(self, metrics: dict[str, Any], traces: list[Trace], evaluate: bool) -> None:
        """Add an iteration's line to metrics.jsonl, and write its traces. evaluate: evaluate first, and add that."""
        tables = {TRAINING: self.graded}
        if evaluate:
            evaluation = self.loop.evaluate(int(metrics["iteration"]))
            metrics = metrics | evaluation.metrics
            traces = traces + evaluation.traces
            tables[EVALUATION] = evaluation.graded
        self._write(metrics, traces, tables)

    def take_over(self, measured: RunFolder) -> bool:
        """Record what another run measured before training, with its traces and without its time.

        Returns whether that run has such a measurement.
        """
        first = next(iter(measured.metrics.read()), {})
        if first.get("iteration") != 0 or "eval/accuracy" not in first:
            return False
        file = trace_file(measured.traces, 0)
        traces = salvage_traces(file).traces if file.is_file() else []
        self.say(f"the evaluation before training is that of {measured.path}")
        self._write(timeless(first), traces, {})
        return True

    def _write(self, metrics: dict[str, Any], traces: list[Trace], tables: dict[str, Graded]) -> None:
        """Add a line to metrics.jsonl, write the traces, warn of a collapse, and tell the tracker."""
        self.loop.resources.progress.enter("recording")
        # JSON has no nan or inf, which the entropy of an evaluation may be.
        metrics = {key: v for key, v in metrics.items() if not isinstance(v, float) or math.isfinite(v)}
        self.shown |= {key: v for key, v in metrics.items() if key in self.headline_of}
        if not self.main:
            return
        with writing(self.folder.path):
            write_traces(self.folder.traces, int(metrics["iteration"]), traces)
            self.folder.metrics.append(metrics)
        for warning in self.collapse_watch.see(metrics):
            tqdm.write(f"warning: {warning}")
        if self.recipe.logging.report_to != "none":
            self.track(metrics, tables)
        self.graded = NOTHING

    def track(self, metrics: dict[str, Any], tables: dict[str, Graded]) -> None:
        """Send an iteration's numbers and its tables of completions to the tracker. tables: by name."""
        accelerator, step, settings = self.loop.accelerator, int(metrics["iteration"]), self.recipe.logging
        for name, graded in tables.items():
            if len(graded) and settings.table_rows:
                send_table(accelerator, settings.report_to, Table.of(name, graded, settings.table_rows), step)
        send_numbers(accelerator, metrics, step)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint of `state`, unless no iteration has been done yet."""
        if self.main and state.iteration:
            self.loop.resources.progress.enter("checkpoint")
            save_checkpoint(self.folder.checkpoints, self.loop.parts, state, self.recipe)

    def keep_step(self, step: SkippedStep) -> None:
        """Write the file of a skipped step, and print a note about it."""
        if not self.main:
            return
        with writing(self.folder.replay):
            path = save_step(self.folder.replay, step, self.loop.policy.trainable(), self.recipe)
        what = f"update {step.step}" if step.step else "all updates"
        self.note(f"{what} of iteration {step.iteration} skipped: {step.reason}; kept as {path}")

    def note(self, sentence: str) -> None:
        """Print a note above the progress bar."""
        if self.main:
            tqdm.write(f"note: {sentence}")

    def headline(self) -> dict[str, str]:
        """The latest metrics for the progress bar, by label."""
        names = self.headline_of | {"eval/accuracy": f"avg@{self.recipe.evaluation.samples}"}
        return {names[key]: f"{self.shown[key]:.3f}" for key in names if key in self.shown}

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Write adapter/, summary.json and curves.png, and print the closing table and the verdict."""
        self.loop.resources.progress.enter("closing")
        self.loop.accelerator.wait_for_everyone()
        if not self.main:
            return {}
        lines = self.folder.metrics.read()
        with writing(self.folder.path):
            with replacing_folder(self.folder.adapter) as aside:
                save_adapter(self.loop.policy, aside)
            draw_curves(lines, self.folder.curves, self.recipe.name, self.panels)
            verdict = self.judge(lines)
            summary = self.summary(state, lines) | {"verdict": asdict(verdict)}
            # The summary is written last, since its presence means that the run is complete.
            replace_text(self.folder.summary, json.dumps(summary, indent=1) + "\n")
        self.say(closing_table(lines, self.recipe.evaluation.samples, self.rows))
        self.say(str(verdict))
        self.say(f"{self.folder.path}: adapter/, curves.png, summary.json, metrics.jsonl, traces/")
        return summary

    def judge(self, lines: list[dict[str, Any]]) -> Verdict:
        """The verdict on the finished run. lines: all of metrics.jsonl."""
        return judge_run(lines, self.recipe)

    def summary(self, state: TrainState, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of summary.json but for the verdict. lines: all of metrics.jsonl."""
        evaluated = [line for line in lines if "eval/accuracy" in line]
        return {
            "name": self.recipe.name,
            "method": self.recipe.method.preset,
            "seed": self.recipe.seed,
            "iterations": state.iteration,
            "updates": state.updates,
            "sampled_tokens": state.tokens,
            "training_seconds": round(state.seconds, 2),
            "evaluation": {
                "prompts": len(self.loop.held_out),
                "samples": self.recipe.evaluation.samples,
                "before": evaluated[0] if evaluated and evaluated[0]["iteration"] == 0 else None,
                "after": evaluated[-1] if evaluated else None,
            },
            "origins": self.loop.parts.origins(state),
            "adapter_sha256": file_hash(self.folder.adapter / "adapter_model.safetensors"),
            "versions": {"hapo_lite": hapo_lite.__version__, "torch": torch.__version__},
            "machine": {
                "device": str(self.loop.accelerator.device),
                "processes": self.loop.accelerator.num_processes,
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
            },
        }
