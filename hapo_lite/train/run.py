"""One run from its folder to its summary: prepare, resume, train, evaluate, save, report.

What a run leaves in `runs/NAME/`: recipe.yaml, status.json, metrics.jsonl, traces/, checkpoints/, adapter/,
summary.json, curves.png.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

import hapo_lite
from hapo_lite.errors import UserError, writing
from hapo_lite.model.adapter import save_adapter
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.model.sharding import shard_base, take_switch
from hapo_lite.recipe import Recipe, flatten
from hapo_lite.records import EncodedPrompt
from hapo_lite.rollout.canary import check_engine
from hapo_lite.rollout.engine import make_engine
from hapo_lite.rollout.whole_base import WholeBaseEngine
from hapo_lite.runs.checkpoint import TrainState, save_checkpoint
from hapo_lite.runs.display import Display
from hapo_lite.runs.files import file_hash, replace_text, replacing_folder
from hapo_lite.runs.folder import RunFolder, check_place, check_same_run, open_folder
from hapo_lite.runs.interrupt import Interrupted, Interrupts
from hapo_lite.runs.progress import Progress
from hapo_lite.runs.skipped import SkippedStep, save_step
from hapo_lite.runs.status import Status
from hapo_lite.runs.trace import write_traces
from hapo_lite.tasks.rewards import Scorer, code_of
from hapo_lite.tasks.stream import LazyPrompts, PromptStream
from hapo_lite.train.accelerator import make_accelerator, someone_wants_to_stop
from hapo_lite.train.collapse import CollapseWatch
from hapo_lite.train.collect import Collector
from hapo_lite.train.curves import closing_table, draw_curves
from hapo_lite.train.loop import Loop
from hapo_lite.train.memory.room import unpacks
from hapo_lite.train.prompts import encode_prompts, load_data, training_prompts
from hapo_lite.train.resume import resume
from hapo_lite.train.verdict import judge_run

HEADLINE = {"reward/mean": "reward", "entropy/all_mean": "entropy", "eval/accuracy": "avg@n"}
"""What the progress bar shows."""


def train(recipe: Recipe) -> dict[str, Any]:
    """Run `recipe` to its end, or on from its newest checkpoint, and return the summary.

    Raises UserError for what the user can mend, and Interrupted after a checkpoint has been written for a signal.
    """
    sharded = take_switch()
    accelerator = make_accelerator(recipe)
    folder = RunFolder(recipe.run_dir)
    check_place(folder)
    main = accelerator.is_main_process
    with (
        Status(folder.status if main else None) as status,
        Display(Progress(status.enter), status, main, recipe.logging.progress) as display,
    ):
        return _train(recipe, accelerator, folder, display, sharded and accelerator.num_processes > 1)


def _train(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, display: Display, sharded: bool
) -> dict[str, Any]:
    say, progress = display.say, display.progress
    check_same_run(folder, recipe)
    with progress.within(f"reading {recipe.data.source}"):
        train_data, held_out_data = load_data(recipe, say)
    with progress.within(f"loading {recipe.model.name}, base {recipe.model.quantization}"):
        unpacked = not sharded and unpacks(recipe, accelerator.device)
        policy = load_policy(recipe.model, recipe.seed, accelerator.device, None, recipe.rollout.engine, unpacked)
    encoded = training_prompts(train_data, policy, recipe.data, recipe.rollout.max_new_tokens, say)
    held_out = encode_prompts(held_out_data, policy, recipe.data, recipe.rollout.max_new_tokens, say)
    if accelerator.is_main_process:
        open_folder(folder, recipe, display.status)
    accelerator.wait_for_everyone()
    say(describe(recipe, policy, encoded, held_out, accelerator))
    if recipe.reward.function:
        say(f"note: reward.function is code, which runs with your rights: {code_of(recipe.reward.function)}")
    for note in recipe.advice():
        say(f"note: {note}")
    if recipe.logging.report_to != "none":
        settings = flatten(recipe.model_dump(mode="json"))
        accelerator.init_trackers("hapo_lite", config={k: "null" if v is None else v for k, v in settings.items()})
    with progress.within(f"rollout.engine = {recipe.rollout.engine}"):
        engine = make_engine(recipe, policy)
    if sharded:
        whole, part = (size / 2**20 for size in shard_base(policy))
        engine = WholeBaseEngine(engine, policy)
        say(f"base split by FSDP: {part:,.2f} MB of the weights in each process, {whole:,.2f} MB while it samples")
    with Scorer(recipe.reward, recipe.rollout.max_new_tokens) as scorer:
        loop = Loop(
            recipe,
            policy,
            Collector(engine, scorer, accelerator, progress),
            PromptStream(encoded, recipe.seed),
            held_out,
            accelerator,
            keep=lambda step: keep_step(folder, recipe, policy, step) if accelerator.is_main_process else None,
        )
        state = resume(folder, recipe, loop, say)
        if not is_over(recipe, state):
            progress.enter("engine check")
            checked = check_engine(engine, policy, encoded, recipe.rollout, recipe.seed, accelerator)
            say(f"rollout.engine = {recipe.rollout.engine}: its log-probabilities are {checked}")
        summary = run_iterations(folder, recipe, loop, state, display)
    if recipe.logging.report_to != "none":
        accelerator.end_training()
    return summary


def run_iterations(
    folder: RunFolder, recipe: Recipe, loop: Loop, state: TrainState, display: Display
) -> dict[str, Any]:
    """Iterate from `state` to the recipe's end; on a signal, save what is whole and raise Interrupted."""
    accelerator, last = loop.accelerator, recipe.training.iterations
    recorder = Recorder(folder, recipe, loop, display.say)

    def short_of_memory(sentence: str, whole: bool) -> None:
        """Say so, and save what there is: after this, memory may run out where nothing can be done."""
        if accelerator.is_main_process:
            tqdm.write(f"note: iteration {state.iteration + 1}: {sentence}")
        if whole:
            recorder.save(state)

    loop.shortage.tell = short_of_memory
    interrupts = Interrupts(deferred=accelerator.num_processes > 1)
    with interrupts.listening(), display.bar(last, state.iteration, "it") as bar:
        try:
            if state.iteration == 0:
                with display.announcing(first_evaluation(recipe, len(loop.held_out))):
                    recorder.record({"iteration": 0}, [], evaluate=recorder.evaluates)
            while not is_over(recipe, state):
                started = time.perf_counter()
                display.status.doing.iteration = state.iteration + 1
                after, metrics, traces = loop.step(state, commit=interrupts.shield)
                due = recipe.evaluation.every and after.iteration % recipe.evaluation.every == 0
                metrics["seconds/iteration"] = time.perf_counter() - started
                recorder.record(metrics, traces, evaluate=recorder.evaluates and bool(due or is_over(recipe, after)))
                state = replace(after, seconds=state.seconds + metrics["seconds/iteration"])
                every = recipe.checkpoint.every
                stuck = state.skipped_in_a_row >= recipe.training.max_skipped
                if is_over(recipe, state) or (every and state.iteration % every == 0) or stuck:
                    recorder.save(state)
                if stuck:
                    raise UserError(hopeless(folder, recipe, state))
                bar.update()
                bar.set_postfix(recorder.headline())
                interrupts.unshield()
                if someone_wants_to_stop(accelerator, interrupts):
                    raise Interrupted(interrupts.pending or signal.SIGTERM)
        except Interrupted:
            recorder.save(state)
            raise
    return recorder.finish(state)


def keep_step(folder: RunFolder, recipe: Recipe, policy: Policy, step: SkippedStep) -> None:
    """Save a step that was skipped, and say so."""
    with writing(folder.replay):
        path = save_step(folder.replay, step, policy.trainable(), recipe)
    what = f"update {step.step}" if step.step else "all updates"
    tqdm.write(f"note: {what} of iteration {step.iteration} skipped: {step.reason}; kept as {path}")


def hopeless(folder: RunFolder, recipe: Recipe, state: TrainState) -> str:
    return (
        f"stopped after iteration {state.iteration}, which is saved: {state.skipped_in_a_row} updates, or iterations "
        f"before their first one, were skipped in a row (training.max_skipped = {recipe.training.max_skipped}); "
        f"python -m hapo_lite.replay FILE, with the newest file of {folder.replay}, shows where it begins"
    )


def first_evaluation(recipe: Recipe, prompts: int) -> str:
    """The sentence that says how long the first evaluation takes, with {} for the time."""
    samples = recipe.evaluation.samples
    return (
        f"first evaluation: {prompts * samples:,} completions, {{}} ({prompts} held-out prompts x {samples} samples; "
        "a lower evaluation.samples or evaluation.prompts shortens it)"
    )


def is_over(recipe: Recipe, state: TrainState) -> bool:
    """Whether the run has come to its last iteration, or has sampled its tokens."""
    training = recipe.training
    return state.iteration >= training.iterations or state.tokens >= (training.max_tokens or float("inf"))


class Recorder:
    """Everything a run writes, by the main process."""

    def __init__(self, folder: RunFolder, recipe: Recipe, loop: Loop, say: Callable[[str], None]) -> None:
        self.folder, self.recipe, self.loop, self.say = folder, recipe, loop, say
        self.main = loop.accelerator.is_main_process
        self.shown: dict[str, float] = {}
        self.watch = CollapseWatch()
        for line in folder.metrics.read() if self.main else ():
            self.watch.see(line)  # What they warned of has been said.

    @property
    def evaluates(self) -> bool:
        return bool(self.loop.held_out)

    def record(self, metrics: dict[str, Any], traces: list, evaluate: bool) -> None:
        """Add an iteration's line to metrics.jsonl and its traces, after an evaluation if one is due."""
        if evaluate:
            evaluation = self.loop.evaluate(int(metrics["iteration"]))
            metrics = metrics | evaluation.metrics
            traces = traces + evaluation.traces
        self.loop.progress.enter("recording")
        # What is nan or inf, such as the entropy of an evaluation, would be no JSON.
        metrics = {key: v for key, v in metrics.items() if not isinstance(v, float) or math.isfinite(v)}
        self.shown |= {key: v for key, v in metrics.items() if key in HEADLINE}
        if not self.main:
            return
        with writing(self.folder.path):
            write_traces(self.folder.traces, int(metrics["iteration"]), traces)
            self.folder.metrics.append(metrics)
        for warning in self.watch.see(metrics):
            tqdm.write(f"warning: {warning}")
        if self.recipe.logging.report_to != "none":
            numbers = {key: value for key, value in metrics.items() if not isinstance(value, list)}
            self.loop.accelerator.log(numbers, step=int(metrics["iteration"]))

    def save(self, state: TrainState) -> None:
        if self.main and state.iteration:
            self.loop.progress.enter("checkpoint")
            loop, folder = self.loop, self.folder.checkpoints
            save_checkpoint(folder, loop.policy, loop.optimizer, loop.scheduler, state, self.recipe, loop.stream)

    def headline(self) -> dict[str, str]:
        names = HEADLINE | {"eval/accuracy": f"avg@{self.recipe.evaluation.samples}"}
        return {names[key]: f"{self.shown[key]:.3f}" for key in names if key in self.shown}

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Write adapter/, summary.json and curves.png, and print the closing table and the verdict."""
        self.loop.progress.enter("closing")
        self.loop.accelerator.wait_for_everyone()
        if not self.main:
            return {}
        lines = self.folder.metrics.read()
        with writing(self.folder.path):
            with replacing_folder(self.folder.adapter) as aside:
                save_adapter(self.loop.policy, aside)
            draw_curves(lines, self.folder.curves, title=self.recipe.name)
            # Last, since it says that the run is complete.
            verdict = judge_run(lines, self.recipe)
            summary = self._summary(state, lines) | {"verdict": asdict(verdict)}
            replace_text(self.folder.summary, json.dumps(summary, indent=1) + "\n")
        self.say(closing_table(lines, self.recipe.evaluation.samples))
        self.say(str(verdict))
        self.say(f"{self.folder.path}: adapter/, curves.png, summary.json, metrics.jsonl, traces/")
        return summary

    def _summary(self, state: TrainState, lines: list[dict[str, Any]]) -> dict[str, Any]:
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
            "origins": {"model": self.loop.policy.origin, "data": self.loop.stream.origin},
            "adapter_sha256": file_hash(self.folder.adapter / "adapter_model.safetensors"),
            "versions": {"hapo_lite": hapo_lite.__version__, "torch": torch.__version__},
            "machine": {
                "device": str(self.loop.accelerator.device),
                "processes": self.loop.accelerator.num_processes,
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
            },
        }


def describe(
    recipe: Recipe,
    policy: Policy,
    prompts: LazyPrompts,
    held_out: Sequence[EncodedPrompt],
    accelerator: Accelerator,
) -> str:
    """The line a run begins with: what is trained, on what, where."""
    adapter = sum(p.numel() for p in policy.trainable().values())
    return (
        f"{recipe.name}: {recipe.method.preset} on {recipe.model.name}, base {recipe.model.quantization}, "
        f"adapter {adapter / 1e6:.2f} M; {len(prompts):,} prompts, {len(held_out)} held out; "
        f"{accelerator.num_processes} x {accelerator.device}"
    )
