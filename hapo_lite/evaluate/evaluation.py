"""One evaluation: the base and the adapter on every suite, resumed where it was stopped, and its summaries.

It writes to `runs/NAME/evaluations/` a folder for each suite, with the samples and summary.json, and a summary.json
over all suites. The model is loaded once; the base is the same model with its adapter switched off.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm

from hapo_lite.errors import UserError, counted, writing
from hapo_lite.evaluate.samples import SampleFile
from hapo_lite.evaluate.sampling import Asking, Sampler, Work, protocol
from hapo_lite.evaluate.scores import Values, by_prompt, differences, intervals, notes, outcomes, table
from hapo_lite.evaluate.session import session_in
from hapo_lite.evaluate.suites import Suite, chosen, fit, read_problems
from hapo_lite.model.policy import Policy
from hapo_lite.model.start import adapter_folder
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.checkpoint import list_checkpoints
from hapo_lite.runs.display import Display
from hapo_lite.runs.files import file_hash
from hapo_lite.runs.folder import RunFolder, nearest_run
from hapo_lite.runs.summary import SuiteSummary
from hapo_lite.train.collect import Collector
from hapo_lite.train.intervals import Interval
from hapo_lite.train.verdict import judge

BASE = "base"
ADAPTER = "adapter"


def evaluate(recipe: Recipe, adapter: Path | None = None) -> dict[str, SuiteSummary]:
    """Evaluate, and return the summaries by suite. adapter: a folder; None: `own_adapter`.

    Raises UserError for a mistake that the user can mend, and Interrupted for a signal; the samples are kept.
    """
    adapter = adapter or own_adapter(recipe)
    with session_in(recipe, _folder(recipe)) as session:
        recipe, display = session.recipe, session.display
        with display.progress.within("reading the problems"):
            problems = [read_problems(settings, recipe) for settings in chosen(recipe)]
        policy = session.load(adapter)
        limit = _max_new_tokens(recipe)
        suites = [fit(p, policy, recipe.data.max_prompt_tokens, limit) for p in problems]
        if note := other_prompts(RunFolder(recipe.run_dir), recipe):
            display.say(f"note: {note}")
        session.claim()
        with session.collecting(policy, limit) as collector:
            summaries = Evaluation(recipe, policy, adapter, suites, collector, display).run()
            return cast(dict[str, SuiteSummary], summaries)


def other_prompts(folder: RunFolder, recipe: Recipe) -> str | None:
    """A sentence if `recipe` asks in another way than the folder's run did; None if not, or if there is no run."""
    try:
        before = load_recipe(folder.recipe)
    except UserError:
        return None
    pairs = {
        "model.chat_template_options": (before.model.chat_template_options, recipe.model.chat_template_options),
        "data.system_prompt": (before.data.system_prompt, recipe.data.system_prompt),
    }
    for name, (then, now) in pairs.items():
        if then != now:
            was = json.dumps(then, ensure_ascii=False)
            return f"the run in {folder.path} was trained with {name}={was}: give that here too to ask as it was asked"
    return None


def own_adapter(recipe: Recipe) -> Path | None:
    """The adapter of the recipe's run or, if the run has not begun, the one that it would go on from."""
    folder = RunFolder(recipe.run_dir)
    if folder.adapter.is_dir():
        return folder.adapter
    if recipe.model.adapter is None or list_checkpoints(folder.checkpoints):
        return None
    return adapter_folder(recipe.model.adapter)


def _folder(recipe: Recipe) -> Path:
    return recipe.run_dir / "evaluations"


def _max_new_tokens(recipe: Recipe) -> int:
    """Longest completion of an evaluation, tokens."""
    return recipe.benchmark.max_new_tokens or recipe.rollout.max_new_tokens


class Evaluation:
    """The base and the adapter on every suite: sampling, summaries, verdicts. adapter: its folder, if there is one."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        adapter: Path | None,
        suites: Sequence[Suite],
        collector: Collector,
        display: Display,
    ) -> None:
        self.recipe = recipe
        self.settings = recipe.benchmark
        self.folder = _folder(recipe)
        self.max_new_tokens = _max_new_tokens(recipe)
        self.policy = policy
        self.adapter = adapter
        self.suites = suites
        self.display = display
        self.main = collector.accelerator.is_main_process
        processor = AdaptiveTemperature(None, self.settings.temperature, top_p=self.settings.top_p)
        asking = Asking(self.settings.samples, processor, DrawKey(recipe.seed, Stage.BENCHMARK, 0))
        self.sampler = Sampler(collector, asking, recipe.rollout.batch_size)

    def run(self) -> dict[str, Any]:
        """Sample what is missing, print and write the summaries, and return them by suite."""
        work = self.plan()
        self.display.say(self.opening(work))
        n = self.settings.samples
        total = sum(len(w.suite.prompts) for w in work) * n
        done = sum(w.file.done for w in work) * n
        summaries: dict[str, dict[str, Any]] = {}
        values: dict[str, list[Values]] = {}
        with (
            self.sampler.interrupts.listening(),
            # The time left follows from the mean pace, since suites differ in length.
            self.display.bar(total, done, "sample", smoothing=0.0) as bar,
        ):
            for suite in self.suites:
                models = {w.file.label: w for w in work if w.suite is suite}
                for label, w in models.items():
                    with self.display.progress.within(f"{suite.name}, {label}"):
                        self.sample(w, bar)
                of_suite = {label: by_prompt(w.file.samples, n) for label, w in models.items()}
                for label, found in of_suite.items():
                    values.setdefault(label, []).append(found)
                summaries[suite.name] = self.report(suite, models, of_suite)
        self.close(summaries, values)
        return summaries

    def plan(self) -> list[Work]:
        """Every model on every suite, with the samples of earlier commands."""
        digest = file_hash(self.adapter / "adapter_model.safetensors") if self.adapter else None
        work = []
        for suite in self.suites:
            for label, weights in ((BASE, None), (ADAPTER, digest)):
                if label == BASE or self.adapter:
                    ids = [e.prompt.id for e in suite.prompts]
                    protocol = self.protocol(suite, weights)
                    file = SampleFile(self.folder / suite.name, label, protocol, ids, self.settings.samples)
                    work.append(Work(suite, file))
        self.sampler.resume(work)
        return work

    def protocol(self, suite: Suite, adapter_sha256: str | None) -> dict[str, Any]:
        """Everything that the samples and their grades depend on, except the machine's rounding."""
        settings = self.settings
        sampling = {"samples": settings.samples, "temperature": settings.temperature, "top_p": settings.top_p}
        return protocol(
            self.recipe, self.policy, suite, adapter_sha256, sampling | {"max_new_tokens": self.max_new_tokens}
        )

    def sample(self, work: Work, bar: tqdm[Any]) -> None:
        """Sample and grade the missing prompts of one model on one suite."""
        switched = self.policy.base_alone() if work.file.label == BASE else contextlib.nullcontext()
        with switched:
            self.sampler.sample(work, bar)

    def report(self, suite: Suite, models: Mapping[str, Work], values: Mapping[str, Values]) -> dict[str, Any]:
        """Print a suite's table and verdict, write its summary.json, and return that. models, values: by label."""
        numbers = self.numbers({label: [v] for label, v in values.items()}, len(suite.prompts))
        summary = {
            "suite": suite.name,
            "source": suite.problems.source,
            "origin": suite.problems.origin,
            "prompts": len(suite.prompts),
            "too_long": {"more_tokens_than": suite.most, "prompts": list(suite.too_long)},
            "rows_skipped": dict(suite.problems.skipped),
            "files": {label: w.file.path.name for label, w in models.items()},
            "outcomes": {label: outcomes(w.file.samples) for label, w in models.items()},
            **numbers,
            # The time of this command alone, without that of earlier ones.
            "seconds": {label: {"prompts": w.sampled, **w.seconds} for label, w in models.items()},
        }
        self.write(self.folder / suite.name, summary)
        self.display.say("\n".join(self._report_lines(suite, models, numbers)))
        return summary

    def _report_lines(self, suite: Suite, models: Mapping[str, Work], numbers: Mapping[str, Any]) -> list[str]:
        lines = [
            f"\n{suite.name}: {counted(len(suite.prompts), 'prompt')} x {self.settings.samples} from "
            f"{suite.problems.source}"
        ]
        lines += suite.problems.left_out
        if suite.too_long:
            named = ", ".join(suite.too_long[:3]) + (", ..." if len(suite.too_long) > 3 else "")
            left_out = counted(len(suite.too_long), "prompt")
            lines.append(f"{left_out} left out: longer than {counted(suite.most, 'token')} ({named})")
        lines += self.lines(numbers)
        for label, w in models.items():
            kinds = outcomes(w.file.samples)
            lines.append(f"{label}: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count))
        for label, w in models.items():
            if w.sampled:
                pace = sum(w.seconds.values()) / w.sampled
                lines.append(f"{label}: {pace:.3g} seconds a prompt, over {counted(w.sampled, 'prompt')}")
        return lines

    def close(self, summaries: Mapping[str, dict[str, Any]], values: Mapping[str, Sequence[Values]]) -> None:
        """Print and write the mean over the suites, each with the same weight, as the paper reports it."""
        count = sum(len(suite.prompts) for suite in self.suites)
        numbers = self.numbers(values, count)
        self.write(self.folder, {"suites": list(summaries), "prompts": count, **numbers})
        if len(summaries) > 1:
            text = [f"\nmean of {len(summaries)} suites, {counted(count, 'prompt')}", *self.lines(numbers)]
            self.display.say("\n".join(text))
        self.display.say(f"\n{self.folder}: summary.json, and the samples of each suite")

    def numbers(self, values: Mapping[str, Sequence[Values]], prompts: int) -> dict[str, Any]:
        """The figures of each model over some suites, their difference, and the verdict."""
        figures = {label: intervals(suites, self.settings.samples) for label, suites in values.items()}
        out: dict[str, Any] = {"figures": figures}
        if ADAPTER in values:
            change = differences(values[BASE], values[ADAPTER], self.settings.samples)
            verdict = judge(figures[BASE], change, self.settings.samples, counted(prompts, "prompt"))
            out |= {"difference": change, "verdict": verdict.word, "sentence": verdict.sentence}
        return out | {"notes": notes(figures, self.max_new_tokens)}

    def lines(self, numbers: Mapping[str, Any]) -> list[str]:
        """The table, the verdict and the notes of some numbers."""
        shown = [table(numbers["figures"], numbers.get("difference"), self.settings.samples)]
        if "sentence" in numbers:
            shown.append(numbers["sentence"])
        return shown + [f"note: {note}" for note in numbers["notes"]]

    def write(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Write summary.json, with the settings of the evaluation."""
        if not self.main:
            return
        settings = self.settings.model_dump(include={"samples", "temperature", "top_p", "limit"})
        adapter = {"adapter": str(self.adapter) if self.adapter else None}
        whole = {**summary, "settings": settings | {"max_new_tokens": self.max_new_tokens, "seed": self.recipe.seed}}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**whole, "model": self.recipe.model.name, **adapter}, indent=1, default=_as_json)
            (folder / "summary.json").write_text(text + "\n", encoding="utf-8")

    def _alone(self) -> str:
        """The base without an adapter, and why: there is no such run, or it is not finished and has a checkpoint."""
        name, folder = self.recipe.model.name, RunFolder(self.recipe.run_dir)
        checkpoints = list_checkpoints(folder.checkpoints)
        if not folder.recipe.is_file():
            return f"there is no run in {folder.path}{nearest_run(folder)}, so {name} alone"
        if not checkpoints:
            return f"{name} alone"
        return (
            f"{name} alone, since the run is not finished (--adapter {checkpoints[-1]} evaluates what it has learned)"
        )

    def opening(self, work: Sequence[Work]) -> str:
        """The first line of output: the model, the suites and the settings."""
        settings = self.settings
        who = f"{self.recipe.model.name} and {self.adapter}" if self.adapter else self._alone()
        done = sum(w.file.done for w in work) * settings.samples
        are_there = f"{'is' if done == 1 else 'are'} there from before"
        before = f"; {counted(done, 'completion')} {are_there}" if done else ""
        return (
            f"{self.recipe.name}: {who} on {', '.join(s.name for s in self.suites)}; "
            f"{counted(settings.samples, 'sample')} at T = {settings.temperature:g}, top_p = {settings.top_p:g}, at "
            f"most {counted(self.max_new_tokens, 'token')}{before}"
        )


def _as_json(value: Any) -> dict[str, Any]:
    """What `json` writes for a record."""
    return value.as_json() if isinstance(value, Interval) else asdict(value)
