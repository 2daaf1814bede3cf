"""One probe: every prompt of the training data is sampled k times, as training would sample it, and graded.

It writes to `runs/NAME/probe/` a file of samples, with which a stopped probe continues, and pass_rates.jsonl, which
`data.pass_rate.file` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hapo_lite.errors import UserError, counted, writing
from hapo_lite.evaluate.samples import Sample, SampleFile
from hapo_lite.evaluate.sampling import Asking, Sampler, Work, protocol
from hapo_lite.evaluate.session import Session, session_in
from hapo_lite.evaluate.suites import Problems, Suite, fit
from hapo_lite.model.policy import Policy
from hapo_lite.model.start import adapter_folder
from hapo_lite.probe.histogram import histogram, lines_of
from hapo_lite.recipe import PassRateSettings, Recipe, flatten
from hapo_lite.records import Prompt
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.files import file_hash
from hapo_lite.runs.summary import ProbeSummary
from hapo_lite.tasks.data import load_prompts
from hapo_lite.tasks.pass_rates import PassRate, problem_hash, write_pass_rates
from hapo_lite.tasks.store import origin_of
from hapo_lite.train.prompts import say_skipped

LABEL = "samples"
RATES = "pass_rates.jsonl"


def probe(recipe: Recipe, k: int | None = None, adapter: str | Path | None = None) -> ProbeSummary:
    """Measure the pass rates of all prompts of `data.source`, and return the summary.

    The prompts that a run would hold out are among them, so that the file serves runs of every seed. k: completions of
    each prompt; None: rollout.completions_per_prompt. adapter: as `model.adapter`, in whose place it is measured.
    Raises UserError for a mistake that the user can mend, and Interrupted for a signal; the samples are kept.
    """
    samples = recipe.rollout.completions_per_prompt if k is None else k
    if samples < 1:
        raise UserError(f"k = {samples}: a probe takes at least one completion of each prompt")
    name = adapter or recipe.model.adapter
    weights = adapter_folder(str(name)) if name else None
    with session_in(recipe, recipe.run_dir / "probe") as session:
        recipe, display = session.recipe, session.display
        with display.progress.within(f"reading {recipe.data.source}"):
            found = load_prompts(recipe.data)
        say_skipped("data", found, display.say)
        policy = session.load(weights)
        problems = Problems("training data", recipe.data.source, found.prompts, {}, origin=origin_of(found.prompts))
        limit = recipe.rollout.max_new_tokens
        suite = fit(problems, policy, recipe.data.max_prompt_tokens, limit, "rollout.max_new_tokens")
        asked = protocol_of(session, policy, suite, weights, samples)
        check_same_probe(session.folder, asked)
        session.claim()
        with session.collecting(policy, limit) as collector:
            rollout = recipe.rollout
            processor = AdaptiveTemperature(
                None, rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p
            )
            asking = Asking(samples, processor, DrawKey(recipe.seed, Stage.PROBE, 0))
            sampler = Sampler(collector, asking, rollout.batch_size)
            file = SampleFile(session.folder, LABEL, asked, [e.prompt.id for e in suite.prompts], samples)
            work = Work(suite, file)
            display.say(
                f"{recipe.name}: {name_of(recipe, name)} on {counted(len(suite.prompts), 'prompt')} x {samples}"
            )
            sample_all(session, sampler, work)
        return report(session, work, found.prompts, asked)


def name_of(recipe: Recipe, adapter: str | Path | None) -> str:
    """The model that is measured, in words."""
    return f"{recipe.model.name} and {adapter}" if adapter else f"{recipe.model.name} alone"


def protocol_of(session: Session, policy: Policy, suite: Suite, adapter: Path | None, samples: int) -> dict[str, Any]:
    """Everything that the pass rates depend on, except the machine's rounding."""
    rollout, data = session.recipe.rollout, session.recipe.data
    digest = file_hash(adapter / "adapter_model.safetensors") if adapter else None
    sampling = {
        "samples": samples,
        **rollout.model_dump(include={"temperature", "top_p", "top_k", "min_p", "max_new_tokens"}),
    }
    # The settings come before the hash of the prompts, so that a refusal names the setting that has changed them.
    chosen = data.model_dump(include={"source", "config", "split", "limit", "system_prompt", "max_prompt_tokens"})
    return {"data": chosen} | protocol(session.recipe, policy, suite, digest, sampling)


def check_same_probe(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raise UserError if the folder holds a probe of another setup, whole or not."""
    for path in sorted(folder.glob(f"{LABEL}-*.jsonl")):
        try:
            with path.open(encoding="utf-8") as file:
                before = flatten(json.loads(file.readline())["protocol"])
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # A kill left it before its first line was whole.
        now = flatten(dict(asked))
        for key in {**now, **before}:
            if before.get(key) != now.get(key):
                then, here = (in_words(key, side.get(key)) for side in (before, now))
                raise UserError(
                    f"{folder} holds a probe with {then}, and this one has {here}: give what that one had to go on, "
                    "choose another name=, or move that folder away"
                )


def in_words(key: str, value: Any) -> str:
    """A field of the protocol for a sentence."""
    if key == "adapter_sha256":
        return "no adapter" if value is None else f"an adapter with the SHA-256 {value}"
    return f"prompts with the hash {value}" if key == "prompts_sha256" else f"{key} = {value}"


def sample_all(session: Session, sampler: Sampler, work: Work) -> None:
    """Sample what is missing. Raises Interrupted after a signal; what was sampled is kept."""
    sampler.resume([work])
    samples = sampler.asking.samples
    total, done = (count * samples for count in (len(work.suite.prompts), work.file.done))
    if done:
        session.display.say(f"{counted(done, 'completion')} from before")
    with (
        sampler.interrupts.listening(),
        session.display.bar(total, done, "sample", smoothing=0.0) as bar,
        session.display.progress.within("probe"),
    ):
        sampler.sample(work, bar)


def rates_of(prompts: Sequence[Prompt], samples: Sequence[Sample], k: int) -> list[PassRate]:
    """The pass rate of each prompt. samples: k for each prompt that has any, in the prompts' order."""
    groups = {samples[i].prompt: samples[i : i + k] for i in range(0, len(samples), k)}
    rates = []
    for prompt in prompts:
        group = groups.get(prompt.id, ())
        rates.append(
            PassRate(
                prompt.id,
                problem_hash(prompt),
                sum(sample.correct for sample in group),
                len(group),
                sum(sample.length for sample in group) / max(len(group), 1),
                sum(sample.truncated for sample in group),
            )
        )
    return rates


def report(session: Session, work: Work, prompts: Sequence[Prompt], asked: Mapping[str, Any]) -> ProbeSummary:
    """Write the pass rates, print their histogram, and return the summary."""
    k = work.file.per_prompt
    rates = rates_of(prompts, work.file.samples, k)
    path = session.folder / RATES
    if session.accelerator.is_main_process:
        with writing(path):
            write_pass_rates(path, asked, rates)
    shares = [rate.rate for rate in rates if rate.attempts]
    low, high = PassRateSettings(file=str(path)).between
    learnable = sum(low <= share <= high for share in shares)
    counts = histogram(shares)
    say = session.display.say
    mean = sum(shares) / len(shares)
    say(f"\npass rates of {counted(len(shares), 'prompt')}, {k} completions of each, mean {mean:.3f}")
    say("\n".join(lines_of(counts)))
    if work.suite.too_long:
        say(f"{counted(len(work.suite.too_long), 'prompt')} left out: longer than {counted(work.suite.most, 'token')}")
    if work.sampled:
        pace = sum(work.seconds.values()) / work.sampled
        say(f"{pace:.3g} seconds a prompt, over {counted(work.sampled, 'prompt')}")
    say(f"{learnable:,} of them lie between {low:g} and {high:g}; data.pass_rate.file={path} trains on those")
    return ProbeSummary(
        file=str(path),
        prompts=len(shares),
        samples=k,
        too_long=len(work.suite.too_long),
        mean=mean,
        learnable=learnable,
        histogram=counts,
        seconds=dict(work.seconds),
    )
