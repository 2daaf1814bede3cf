"""One run from its folder to its summary: prepare, resume, train, evaluate, save, report.

A run writes into `runs/NAME/`: recipe.yaml, status.json, metrics.jsonl, traces/, checkpoints/, replay/ (skipped steps),
adapter/, summary.json, curves.png.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from accelerate import Accelerator

from hapo_lite.errors import UserError, counted, first_line
from hapo_lite.model.experts import notes_on_experts, notes_on_packing
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.model.sharding import fsdp_requested, shard_base
from hapo_lite.model.template import reads_date
from hapo_lite.model.unpacked import Unpacking
from hapo_lite.recipe import Recipe, flatten
from hapo_lite.records import EncodedPrompt, Graded
from hapo_lite.rollout.canary import check_engine
from hapo_lite.rollout.engine import Engine, make_engine
from hapo_lite.runs.checkpoint import TrainState, list_checkpoints
from hapo_lite.runs.display import Display
from hapo_lite.runs.folder import (
    RunFolder,
    check_place,
    check_same_run,
    open_folder,
    recipe_behind,
    with_date,
    with_date_of,
)
from hapo_lite.runs.interrupt import Interrupted, Interrupts
from hapo_lite.runs.progress import Progress
from hapo_lite.runs.skipped import SkippedStep
from hapo_lite.runs.status import Status
from hapo_lite.runs.summary import RunSummary
from hapo_lite.tasks.curriculum import make_stream
from hapo_lite.tasks.data import Column
from hapo_lite.tasks.pass_rates import PassRates
from hapo_lite.tasks.rewards import Scorer, notes_on_code
from hapo_lite.tasks.stream import LazyPrompts
from hapo_lite.train.accelerator import busy_cpu, make_accelerator, stop_if_asked, unseen_gpu
from hapo_lite.train.collect import Collector
from hapo_lite.train.loop import Loop
from hapo_lite.train.memory.room import unpacks
from hapo_lite.train.observer import Observer
from hapo_lite.train.prompts import Data, encode_prompts, first_prompt, load_data, training_prompts
from hapo_lite.train.recorder import Recorder
from hapo_lite.train.resume import resume


def train(recipe: Recipe, measured: RunFolder | None = None) -> RunSummary:
    """Run `recipe` to its end, from its newest checkpoint if there is one, and return the summary.

    measured: a run that starts from the same policy and evaluates it alike. What it measured before training is taken
    over instead of measured again. Raises UserError for a problem that the user can mend. After a signal it writes a
    checkpoint and raises Interrupted.
    """
    return cast(RunSummary, run_in_folder(recipe, partial(Run, measured=measured)))


def run_in_folder(recipe: Recipe, kind: Callable[..., Run]) -> dict[str, Any]:
    """Do a run of that kind in the recipe's folder, with its status and its display, and return the summary.

    Raises as `train` does.
    """
    sharded = fsdp_requested()
    accelerator = make_accelerator(recipe)
    folder = RunFolder(recipe.run_dir)
    check_place(folder)
    recipe = with_date_of(folder, recipe)
    main = accelerator.is_main_process
    with (
        Status(folder.status if main else None) as status,
        Display(Progress(status.enter), status, main, recipe.logging.progress) as display,
    ):
        run = kind(recipe, accelerator, folder, display, sharded and accelerator.num_processes > 1)
        return run.to_its_end()


@dataclass(frozen=True)
class Run:
    """One run in its folder.

    sharded: FSDP splits the base over several processes. measured: as for `train`.
    """

    recipe: Recipe
    accelerator: Accelerator
    folder: RunFolder
    display: Display
    sharded: bool
    measured: RunFolder | None = None

    def to_its_end(self) -> dict[str, Any]:
        """Prepare, resume, check the engine, iterate, and return the summary."""
        recipe, progress = self.recipe, self.display.progress
        check_same_run(self.folder, recipe)
        for note in notes_on_code(recipe.reward):
            self.display.say(note)
        with Scorer(recipe.reward, recipe.rollout.max_new_tokens) as scorer:
            with progress.within(f"reading {recipe.data.source}"):
                data = self.read_data(scorer.columns)
            with progress.within(f"loading {recipe.model.name}, base {recipe.model.quantization}"):
                policy = self.load()
            return self.dated(policy).with_policy(policy, data, scorer)

    def dated(self, policy: Policy) -> Run:
        """The run with the date in its recipe that its chat template takes for today, if the template reads one."""
        if not reads_date(policy.tokenizer):
            return self
        return replace(self, recipe=with_date(self.recipe, policy.rendering.date))

    def with_policy(self, policy: Policy, data: Data, scorer: Scorer) -> dict[str, Any]:
        """Encode the prompts, resume, check the engine, iterate, and return the summary."""
        recipe, say, progress = self.recipe, self.display.say, self.display.progress
        limit = recipe.rollout.max_new_tokens
        scorer.opening = policy.opening
        prompts = self.training_prompts(data, policy)
        held_out = encode_prompts(data.held_out, policy, recipe.data, limit, say)
        self.open(policy, prompts, held_out)
        with progress.within(f"rollout.engine = {recipe.rollout.engine}"):
            engine = self.make_engine(policy)
        collector = Collector(engine, scorer, self.accelerator, progress)
        loop = self.make_loop(policy, collector, prompts, held_out, data.rates)
        state = resume(self.folder, recipe, loop, say)
        if loop.samples and not is_over(loop.recipe, state):
            progress.enter("engine check")
            checked = check_engine(engine, policy, prompts, recipe.rollout, recipe.seed, self.accelerator)
            say(f"rollout.engine = {recipe.rollout.engine}: its log-probabilities are {checked}")
        summary = self.iterate(loop, state)
        if recipe.logging.report_to != "none":
            self.accelerator.end_training()
        return summary

    def read_data(self, columns: Sequence[Column]) -> Data:
        """The prompts to train on and to evaluate on. columns: those of the data that rewards ask for."""
        recipe = self.recipe
        before = recipe_behind(recipe.model.adapter)
        data = load_data(recipe.data, recipe.evaluation, recipe.seed, self.display.say, columns, before=before)
        return data.chosen(recipe.data.pass_rate, self.display.say)

    def training_prompts(self, data: Data, policy: Policy) -> LazyPrompts:
        """The prompts to train on, tokenised when they are read."""
        recipe = self.recipe
        return training_prompts(data.training, policy, recipe.data, recipe.rollout.max_new_tokens, self.display.say)

    def make_loop(
        self,
        policy: Policy,
        collector: Collector,
        prompts: LazyPrompts,
        held_out: Sequence[EncodedPrompt],
        rates: PassRates,
    ) -> Loop:
        """The loop of the run's iterations."""
        stream = make_stream(prompts, self.recipe.data, rates, self.recipe.seed)
        return Loop(self.recipe, policy, collector, stream, held_out)

    def make_recorder(self, loop: Loop) -> Recorder:
        """The writer of the run's files."""
        return Recorder(self.folder, self.recipe, loop, self.display.say)

    def load(self) -> Policy:
        """Load the policy onto the run's device. A run with a checkpoint does not need the adapter it began with."""
        recipe, device = self.recipe, self.accelerator.device
        unpacked = Unpacking.NEVER if self.sharded else unpacks(recipe, device)
        model = recipe.model.without_adapter() if list_checkpoints(self.folder.checkpoints) else recipe.model
        return load_policy(model, recipe.seed, device, engine=recipe.rollout.engine, unpacked=unpacked)

    def open(self, policy: Policy, prompts: LazyPrompts, held_out: Sequence[EncodedPrompt]) -> None:
        """Make the folder, start the tracker, and print what is trained, with notes about the recipe."""
        recipe, say, device = self.recipe, self.display.say, self.accelerator.device
        if self.accelerator.is_main_process:
            open_folder(self.folder, recipe, self.display.status)
        self.accelerator.wait_for_everyone()
        for line in self.introduction(policy, prompts, held_out):
            say(line)
        for note in [unseen_gpu(), busy_cpu(device), *self.advice()]:
            if note is not None:
                say(f"note: {note}")
        if recipe.logging.report_to != "none":
            settings = flatten(recipe.model_dump(mode="json"))
            config = {key: "null" if value is None else value for key, value in settings.items()}
            self.accelerator.init_trackers("hapo_lite", config=config)

    def introduction(self, policy: Policy, prompts: LazyPrompts, held_out: Sequence[EncodedPrompt]) -> Iterator[str]:
        """What is trained on what, in lines."""
        yield describe(self.recipe, policy, prompts, held_out, self.accelerator)
        if policy.started_from:
            yield f"going on from the adapter {policy.started_from}"
        yield from notes_on_packing(policy)
        yield from notes_on_experts(policy.model)
        yield from first_prompt(prompts, policy)

    def advice(self) -> list[str]:
        """Sentences about settings that are allowed but seldom meant."""
        return self.recipe.advice()

    def make_engine(self, policy: Policy) -> Engine:
        """Start the rollout engine, and split the base over the processes if FSDP was requested."""
        engine = make_engine(self.recipe, policy)
        if self.sharded:
            whole, part = (size / 2**20 for size in shard_base(policy))
            self.display.say(
                f"base split by FSDP: {part:,.2f} MB of the weights in each process, {whole:,.2f} MB while it samples"
            )
        return engine

    def iterate(self, loop: Loop, state: TrainState) -> dict[str, Any]:
        """Iterate from `state` to the recipe's end.

        A signal raises Interrupted after the last whole state is saved. An error ends the run, and the state is saved
        before it if the weights are still those of that state.
        """
        recipe, display = self.recipe, self.display
        recorder = self.make_recorder(loop)
        interrupts = Interrupts(deferred=self.accelerator.num_processes > 1)
        observer = RunObserver(recorder, interrupts, state)
        loop.watch(observer)
        with interrupts.listening(), display.bar(loop.recipe.training.iterations, state.iteration, "it") as bar:
            try:
                if state.iteration == 0 and not (self.measured and recorder.take_over(self.measured)):
                    with display.announcing(first_evaluation(recipe, len(loop.held_out))):
                        recorder.record({"iteration": 0}, [], evaluate=recorder.evaluates)
                while not is_over(loop.recipe, observer.state):
                    display.status.doing.iteration = observer.state.iteration + 1
                    observer.state = self.iteration(loop, recorder, observer.state)
                    bar.update()
                    bar.set_postfix(recorder.headline())
                    interrupts.unshield()
                    stop_if_asked(self.accelerator, interrupts)
            except Interrupted:
                recorder.save(observer.state)
                raise
            except Exception:
                observer.rescue()
                raise
        return recorder.finish(observer.state)

    def iteration(self, loop: Loop, recorder: Recorder, state: TrainState) -> TrainState:
        """Do one iteration, and the evaluation and checkpoint that are due after it.

        Raises UserError after too many skipped updates in a row.
        """
        recipe = self.recipe
        started = time.perf_counter()
        done = loop.step(state)
        seconds = time.perf_counter() - started
        number = done.state.iteration
        over = is_over(loop.recipe, done.state)
        evaluate = recorder.evaluates and (over or is_due(number, recipe.evaluation.every))
        recorder.record({**done.metrics, "seconds/iteration": seconds}, done.traces, evaluate)
        state = replace(done.state, seconds=state.seconds + seconds)
        stuck = state.skipped_in_a_row >= recipe.training.max_skipped
        if over or stuck or is_due(number, recipe.checkpoint.every):
            recorder.save(state)
        if stuck:
            raise UserError(self.stuck(number, state.skipped_in_a_row))
        return state

    def stuck(self, iteration: int, skipped: int) -> str:
        """The sentence with which a run stops that has skipped so many updates in a row."""
        return (
            f"stopped after iteration {iteration}, which is saved: {skipped} updates, or iterations before their first "
            f"one, were skipped in a row (training.max_skipped = {self.recipe.training.max_skipped}); python -m "
            f"hapo_lite.replay FILE, with the newest file of {self.folder.replay}, shows where it begins"
        )


class RunObserver(Observer):
    """Saves and prints what happens in a run. state: the run's state after its last whole iteration."""

    def __init__(self, recorder: Recorder, interrupts: Interrupts, state: TrainState) -> None:
        self.recorder = recorder
        self.interrupts = interrupts
        self.state = state

    def before_update(self) -> None:
        # Several processes only note a signal. Here they can still abandon the iteration, and need not end it first.
        stop_if_asked(self.recorder.loop.accelerator, self.interrupts)
        self.interrupts.shield()

    def on_graded(self, graded: Graded) -> None:
        self.recorder.graded = graded

    def on_skip(self, step: SkippedStep) -> None:
        self.recorder.keep_step(step)

    def on_note(self, sentence: str) -> None:
        self.recorder.note(sentence)

    def on_shortage(self, sentence: str, weights_unchanged: bool) -> None:
        """Print a note, and save a checkpoint, since memory may run out again where the run cannot recover."""
        self.recorder.note(f"iteration {self.state.iteration + 1}: {sentence}")
        if weights_unchanged:
            self.recorder.save(self.state)

    def rescue(self) -> None:
        """Save the last whole state before an error ends the run, unless the weights may have changed since then."""
        if self.interrupts.shielded or not self.state.iteration:
            return
        self.interrupts.shield()
        try:
            self.recorder.save(self.state)
            self.recorder.note(f"the run is saved up to iteration {self.state.iteration}")
        except Exception as failed:
            # Raised, it would take the place of the error that ends the run, of which it may be a consequence.
            self.recorder.note(f"iteration {self.state.iteration} is not saved: {first_line(failed)}")


def is_over(recipe: Recipe, state: TrainState) -> bool:
    """Whether the run has done its last iteration, or has sampled training.max_tokens."""
    training = recipe.training
    return state.iteration >= training.iterations or state.tokens >= (training.max_tokens or math.inf)


def is_due(iteration: int, every: int) -> bool:
    """Whether something that happens every `every` iterations is due after this one. every = 0: only at the end."""
    return every > 0 and iteration % every == 0


def first_evaluation(recipe: Recipe, prompts: int) -> str:
    """The sentence that announces how long the first evaluation takes, with {} for the time."""
    samples = recipe.evaluation.samples
    return (
        f"first evaluation: {counted(prompts * samples, 'completion')}, {{}} ({counted(prompts, 'held-out prompt')} x "
        f"{counted(samples, 'sample')}; a lower evaluation.samples or evaluation.prompts shortens it)"
    )


def describe(
    recipe: Recipe,
    policy: Policy,
    prompts: LazyPrompts,
    held_out: Sequence[EncodedPrompt],
    accelerator: Accelerator,
) -> str:
    """The first line of a run: the model, the prompts, and the devices."""
    adapter = sum(p.numel() for p in policy.trainable().values())
    return (
        f"{recipe.name}: {recipe.method.preset} on {recipe.model.name}, base {recipe.model.quantization}, "
        f"adapter {adapter / 1e6:.2f} M; {counted(len(prompts), 'prompt')}, {len(held_out)} held out; "
        f"{accelerator.num_processes} x {accelerator.device}"
    )
