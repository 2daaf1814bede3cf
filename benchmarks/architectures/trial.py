"""One family's trial: its small model goes through preflight, train, evaluate and export, and its numbers are compared.

Each step is a command as a user calls it. A setting that a refusal's sentence recommends is tried once, so the sentence
has to be right.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

# The commands import these late. Imported here, they are there before a step is forked.
import hapo_lite.evaluate.evaluation
import hapo_lite.export.export
import hapo_lite.preflight.preflight
import hapo_lite.train.run  # noqa: F401
from benchmarks.architectures import reward
from hapo_lite.evaluate import __main__ as evaluate
from hapo_lite.export import __main__ as export
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.preflight import __main__ as preflight
from hapo_lite.recipe import Recipe, find_recipe, load_recipe
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout.canary import engine_logp, perturbed_adapter, trainer_logp
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.train import __main__ as train

CLOSE = 1e-4
"""Largest allowed difference of a token's log-probability between sampler and trainer in fp32, nats."""
ADVICE = re.compile(r"\b((?:model|rollout)\.\w+=\w+)")
"""A setting that a sentence recommends."""
SMALL = (
    "training.iterations=1",
    "training.updates_per_iteration=1",
    "training.warmup_updates=0",
    "rollout.prompts_per_iteration=2",
    "rollout.completions_per_prompt=4",
    "rollout.max_new_tokens=8",
    "data.max_prompt_tokens=64",
    "rollout.old_logprobs=recomputed",
    "evaluation.prompts=0",
    "benchmark.samples=2",
    "benchmark.max_new_tokens=8",
    "logging.progress=false",
    "reward.workers=1",
)
PROMPTS = (3, 30, 41, 12)
"""Tokens of the prompts that sampler and trainer are compared on: shorter and longer than a window of 16."""


@dataclass(frozen=True)
class Done:
    """How a command ended. code: its exit code, or None if it was killed. text: what it wrote."""

    code: int | None
    text: str

    @property
    def sentence(self) -> str:
        """The sentence of a refusal; "" if there is none."""
        found = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return found[-1].removeprefix("error: ") if found else ""

    @property
    def result(self) -> str:
        """`ran`, `refused`, `traceback` or `killed`."""
        if self.code == 0:
            return "ran"
        if self.code == 2 and self.sentence and "Traceback" not in self.text:
            return "refused"
        return "killed" if self.code is None else "traceback"


Step = Callable[[], int]
Apart = Callable[[Step], Done]
"""Runs a step apart from the others, and catches what it writes."""


@dataclass
class Report:
    """The findings about one family. results, sentences: by command; facts: see `facts_of`."""

    family: str
    example: str
    settings: list[str] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether an iteration ran, with a sampler and a trainer that agree."""
        return self.results.get("train") == "ran" and self.facts.get("gap", math.inf) <= CLOSE

    @property
    def problem(self) -> str:
        """The last line of what went wrong as the model was made; "" if it was made."""
        return self.sentences.get("model", "").rpartition("\n")[2]

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Trial:
    """The steps of one family's trial in a folder, which has the small model in `model`."""

    def __init__(self, folder: Path, apart: Apart) -> None:
        self.folder, self.apart = folder, apart

    def arguments(self, settings: Sequence[str]) -> list[str]:
        """The recipe and its settings, as a command takes them."""
        problems = self.folder / "problems.jsonl"
        if not problems.exists():
            rows = [{"problem": f"{i}+{i * i}=?", "answer": str(i + i * i)} for i in range(1, 9)]
            problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [
            str(find_recipe(Path("tiny_cpu"))),
            f"model.name={self.folder / 'model'}",
            f"data.source={problems}",
            f"output_dir={self.folder / 'runs'}",
            f"reward.function={reward.__file__}:spread",
            "model.dtype=auto",  # preflight is for a card, whose products of experts take bf16 alone
            *SMALL,
            *settings,
        ]

    def run(self, report: Report) -> Report:
        """All commands in turn; export and evaluation only of a family that trains."""
        self.try_with_advice(report, "train", lambda given: lambda: run_command(train.main, given))
        given = self.arguments(report.settings)
        self.note(report, "preflight", lambda: run_command(preflight.main, [*given, "--shape-only", "--card", "8"]))
        suite = ["--suite", str(self.folder / "problems.jsonl")]
        self.note(report, "evaluate", lambda: run_command(evaluate.main, [*given, *suite]))
        if report.results["train"] == "ran":
            run = str(self.folder / "runs" / "tiny_cpu")
            self.note(report, "export", lambda: run_command(export.main, [run, "--to", "merged"]))
            report.facts = self.facts(report)
        return report

    def note(self, report: Report, command: str, step: Step) -> Done:
        done = self.apart(step)
        report.results[command] = done.result
        if done.result != "ran":
            report.sentences[command] = done.sentence or done.text.strip()[-1500:]
        return done

    def try_with_advice(self, report: Report, command: str, step: Callable[[list[str]], Step]) -> None:
        """Run a command and, where it is refused, again with the settings that the sentence recommends."""
        while True:
            done = self.note(report, command, step(self.arguments(report.settings)))
            fresh = [advice for advice in ADVICE.findall(done.sentence) if advice not in report.settings]
            if done.result != "refused" or not fresh:
                return
            report.settings.append(fresh[0])
            report.sentences.pop(command)
            report.facts[f"refused without {fresh[0]}"] = done.sentence

    def facts(self, report: Report) -> dict[str, Any]:
        """`facts_of` the small model, or what went wrong."""
        target = self.folder / "facts.json"

        def step() -> int:
            found = facts_of(load_recipe(*self.recipe(report.settings)), self.folder / "runs" / "tiny_cpu")
            target.write_text(json.dumps(found), encoding="utf-8")
            return 0

        done = self.apart(step)
        found = json.loads(target.read_text(encoding="utf-8")) if done.code == 0 else {"problem": done.text[-1500:]}
        return report.facts | found

    def recipe(self, settings: Sequence[str]) -> tuple[Path, list[str]]:
        path, *overrides = self.arguments(settings)
        return Path(path), overrides


def run_command(main: Callable[[list[str] | None], object], arguments: list[str]) -> int:
    from hapo_lite.cli import run_command as run

    return run(main, arguments)


def facts_of(recipe: Recipe, run: Path) -> dict[str, Any]:
    """The facts that the table gives about a model that trains.

    packed, unpacked: kinds of layers in 4 bits, and of those that multiply and are not; adapted: kinds with an adapter;
    unmoved: those of them that an iteration did not change; cache: `fixed` or `growing`; gap: the largest difference
    between sampler and trainer in fp32, nats.
    """
    base = load_policy(recipe.model, recipe.seed, "cpu", adapter=run / "adapter").base
    adapted: dict[str, bool] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            moved = any(bool(p.any()) for n, p in module.named_parameters() if "lora_B" in n)
            adapted[kind_of(name)] = adapted.get(kind_of(name), False) or moved
    packed = {kind_of(name) for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    plain = recipe.model.model_copy(update={"quantization": "none", "dtype": "fp32"})
    gap, fixed = gap_of(load_policy(plain, recipe.seed, "cpu", adapter=run / "adapter"))
    return {
        "packed": sorted(packed),
        "unpacked": sorted(products_of(base) - packed),
        "adapted": sorted(adapted),
        "unmoved": sorted(kind for kind, moved in adapted.items() if not moved),
        "cache": "fixed" if fixed else "growing",
        "gap": gap,
    }


def kind_of(name: str) -> str:
    """A layer's own name, without its place in the model and without the adapter's wrapping."""
    return re.sub(r"(\.base_layer)+$", "", name).rpartition(".")[2]


def products_of(base: PreTrainedModel) -> set[str]:
    """Kinds of layers whose weights are matrices, and `experts`, but for embeddings, head and convolutions."""
    left_out = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = set()
    for name, parameter in base.named_parameters():
        layer, _, own = name.rpartition(".")
        module = base.get_submodule(layer)
        if (
            "lora_" in name
            or parameter.ndim < 2
            or isinstance(module, left_out)
            or module is base.get_output_embeddings()
        ):
            continue
        found.add("experts" if "experts" in name else kind_of(layer) if own == "weight" else own)
    return found


def gap_of(policy: Policy) -> tuple[float, bool]:
    """The largest difference of a token's log-probability between sampler and trainer, and whether the cache is fixed.

    The policy has a trained adapter, which is perturbed. Prompts of several lengths are sampled together, and rows end
    at different steps.
    """
    generator = torch.Generator().manual_seed(1)
    prompts = [
        EncodedPrompt(
            i, Prompt(str(i), (("user", ""),), "0"), tuple(torch.randint(3, 380, (n,), generator=generator).tolist())
        )
        for i, n in enumerate(PROMPTS)
    ]
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(3)]
    # What training has not moved may be left out of it: some code reads a weight without calling its layer.
    moved = [p for name, p in policy.model.named_parameters() if "lora_B" in name and bool(p.any())]
    directions = [(p, torch.randn(p.shape, generator=generator)) for p in moved]
    policy.model.train()
    policy = replace(policy, stop_ids=tuple(range(20, 380, 24)))
    engine = TransformersEngine(policy, len(requests), 24)
    with perturbed_adapter(directions, 0.05):
        written = engine.sample(requests, AdaptiveTemperature(None, 1.0), DrawKey(0, Stage.TRAINING, 1))
        difference = (trainer_logp(policy, written, 1.0) - engine_logp(written)).abs()
    return float(difference.max()), engine.fixed is True
