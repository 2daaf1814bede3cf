"""The recipe: every setting of a run, typed, with bounds, and every rule between fields with its reason.

A recipe is a YAML file of sections; `section.key=value` on the command line overrides it. The resolved recipe is saved
with the run, so that `runs/NAME/recipe.yaml` is all that is needed to repeat it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.errors import UserError
from hapo_lite.settings import Section, apply_override, describe, nearest, read_mapping, validate

QWEN_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."

FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]

MAY_CHANGE = (
    "output_dir",
    "model.revision",
    "data.revision",
    "training.iterations",
    "training.max_tokens",
    "training.max_skipped",
    "training.micro_batch_tokens",
    "rollout.batch_size",
    "rollout.engine_memory",
    "rollout.unpacked_base",
    "model.gradient_checkpointing",
    "model.activation_offload",
    "checkpoint",
    "logging",
    "evaluation.every",
    "benchmark",
)
"""What a resumed run may have changed in its recipe without ceasing to be the same run.

Revisions, since a checkpoint knows the commit that they stood for.
"""


def one_folder(name: str) -> str:
    if not re.fullmatch(FOLDER_NAME, name):
        raise ValueError(
            "must be one folder name of at most 100 letters, digits and . _ + -: a run writes nowhere else"
        )
    return name


class LoraSettings(Section):
    rank: Positive = Field(32, description="Rank of the adapter matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(64.0, description="Scale: the adapter's output is times alpha / rank")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Layers to adapt: all-linear (all but the head), or a list of module names"
    )


class ModelSettings(Section):
    name: str = Field(description="Hub name or folder of a causal language model, or `tiny` for the bundled one")
    revision: str | None = Field(None, description="Hub revision (commit, tag or branch)")
    trust_remote_code: bool = Field(
        False, description="Run the Python code that the model brings, with your rights; a hub name needs its commit"
    )
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: 4-bit base with double quantisation; none")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Compute dtype; auto: bf16 where the GPU has it, else fp16; fp32 on CPU"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention implementation")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward: less memory")
    activation_offload: bool = Field(
        False, description="Keep what gradient_checkpointing keeps in main memory: less on the card, somewhat slower"
    )
    lora: LoraSettings = Field(default_factory=LoraSettings, description="Adapter")


class DataSettings(Section):
    source: str = Field(
        description="`tiny` (the built-in task), a local .parquet, .jsonl, .json or .csv file, or a hub data set"
    )
    config: str | None = Field(None, description="Configuration of a hub data set, such as `main`")
    revision: str | None = Field(None, description="Hub revision of the data set")
    split: str = Field("train", description="Split of a hub data set or of the built-in task")
    problem_column: str | None = Field(
        None, description="Column of the problem, dots for nested ones; null: prompt, problem or question, as found"
    )
    answer_column: str | None = Field(
        None, description="Column of the answer; null: reward_model.ground_truth, answer or solution, as found"
    )
    system_prompt: str | None = Field(
        QWEN_SYSTEM_PROMPT, description="System message; null: none. Left out where the data has one of its own"
    )
    limit: Positive | None = Field(None, description="Use only the first so many prompts that are usable")
    max_prompt_tokens: Positive = Field(1024, description="Longer prompts are left out, and counted")


class RewardSettings(Section):
    function: str | None = Field(
        None, description="Your own reward as module:function (see docs/rewards.md); null: grade the answer"
    )
    correct: float = Field(1.0, description="Reward of a correct answer")
    wrong: float = Field(0.0, description="Reward of any other outcome")
    overlong_buffer: NonNegative = Field(
        0, description="DAPO's soft overlong penalty: its ramp, in tokens before max_new_tokens; 0: off"
    )
    overlong_penalty: Annotated[float, Field(ge=0)] = Field(1.0, description="Penalty at the end of that ramp")
    timeout_s: Annotated[float, Field(gt=0)] = Field(5.0, description="Deadline of one grading, seconds")
    workers: Positive = Field(2, description="Grading processes")


class RolloutSettings(Section):
    engine: Literal["transformers", "paged", "vllm", "unsloth"] = Field(
        "transformers", description="What samples: generate of transformers, its continuous batching, vLLM, or Unsloth"
    )
    engine_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4, description="Share of the GPU's memory for vLLM, which has a base of its own and sleeps during the update"
    )
    prompts_per_iteration: Positive = Field(32, description="P")
    completions_per_prompt: Positive = Field(8, description="G, the size of a group")
    max_new_tokens: Positive = Field(1024, description="Longest completion, tokens")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="T_base")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the nucleus that holds so much probability; needs method.importance=truncated"
    )
    top_k: Positive | None = Field(None, description="Sample from the k likeliest only; needs the same; null: all")
    batch_size: Positive = Field(64, description="Completions sampled at once; bounds the memory of the KV cache")
    unpacked_base: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Unpack a 4-bit base once a rollout, instead of in every step, and keep it until the rollout ends; "
        "auto: where memory allows",
    )
    old_logprobs: Literal["recomputed", "sampled"] = Field(
        "recomputed", description="pi_old from one pass of the trainer (exact), or the sampler's own (saves the pass)"
    )
    dynamic_sampling: bool = Field(
        False, description="DAPO: drop groups whose rewards are all equal, and sample others in their place"
    )
    token_budget: Positive | None = Field(
        None, description="Most completion tokens sampled in an iteration with dynamic_sampling; null: 4 x P x G x max"
    )


class TrainingSettings(Section):
    iterations: Positive = Field(description="Iterations: rollout, score, update")
    max_tokens: Positive | None = Field(
        None, description="End after the iteration in which this many completion tokens have been sampled; null: never"
    )
    updates_per_iteration: Positive = Field(4, description="Optimiser steps on each iteration's completions")
    micro_batch_tokens: Positive = Field(
        16384, description="Padded tokens, prompt included, in one forward and backward; changes memory, no result"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field("adamw", description="Optimiser")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-5, description="Peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After the warm-up")
    warmup_updates: NonNegative = Field(10, description="Optimiser steps of linear warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay")
    max_skipped: Positive = Field(
        10, description="Updates skipped in a row, for numbers that are not finite, after which the run stops"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient clipping, global L2 norm")


class EvaluationSettings(Section):
    every: NonNegative = Field(10, description="Iterations between evaluations; 0: only before and after; both always")
    prompts: NonNegative = Field(64, description="Held-out prompts; 0: no evaluation at all")
    samples: Positive = Field(8, description="Completions per prompt: the n of avg@n")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="Sampling temperature, the same for all tokens")
    data: DataSettings | None = Field(
        None,
        description="Held-out data; null: the built-in task's test split, or rows set aside from the training data",
    )


class SuiteSettings(Section):
    """One set of problems to evaluate on. In a recipe it may also be written as text: NAME, FILE or NAME=FILE."""

    name: str = Field(description="aime24, ..., or a name of your own: the folder that the results go to")
    source: str | None = Field(None, description="As data.source; null: what the name stands for")
    config: str | None = Field(None, description="As data.config")
    revision: str | None = Field(None, description="As data.revision")
    split: str = Field("test", description="As data.split")
    problem_column: str | None = Field(None, description="As data.problem_column")
    answer_column: str | None = Field(None, description="As data.answer_column")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, suite: Any) -> Any:
        if not isinstance(suite, str):
            return suite
        name, equals, source = suite.partition("=")
        if equals:
            return {"name": name, "source": source}
        path = Path(suite)
        return {"name": path.stem, "source": suite} if path.suffix or "/" in suite else {"name": suite}

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, name: str) -> str:
        return one_folder(name)


class BenchmarkSettings(Section):
    suites: tuple[SuiteSettings, ...] | None = Field(
        None,
        description="List of names, files, NAME=FILE or {name, source, config, split, problem_column, answer_column}; "
        "null: the built-in task for a run on it, else the six of the paper",
    )
    limit: Positive | None = Field(None, description="Use only the first so many prompts of each suite")
    samples: Positive = Field(8, description="Completions per prompt: the n of avg@n, pass@n and maj@n")
    temperature: Annotated[float, Field(gt=0)] = Field(0.5, description="Sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="Sample from the likeliest tokens that hold so much probability; 1: from all"
    )
    max_new_tokens: Positive | None = Field(None, description="Longest completion; null: rollout.max_new_tokens")

    @field_validator("suites", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, suites: Any) -> Any:
        return [suites] if isinstance(suites, (str, dict)) else suites

    @field_validator("suites")
    @classmethod
    def _names_differ(cls, suites: tuple[SuiteSettings, ...] | None) -> tuple[SuiteSettings, ...] | None:
        names = [suite.name for suite in suites or ()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two suites are named {name}: write NAME=FILE to tell them apart")
        return suites


class CheckpointSettings(Section):
    every: NonNegative = Field(10, description="Iterations between checkpoints; 0: only at the end or when interrupted")
    keep: Positive = Field(2, description="Newest checkpoints kept")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue this run from its newest checkpoint; never: refuse a folder that has one"
    )


class LoggingSettings(Section):
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field("none", description="Tracker")
    traces_per_iteration: NonNegative = Field(4, description="Completions whose tokens are recorded each iteration")
    progress: bool = Field(True, description="Show what the run is doing, and the bar of iterations")


class Recipe(Section):
    """All settings of one run."""

    name: str = Field(description="The run's folder below output_dir")
    output_dir: str = Field("runs", description="Where run folders are made")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Decides prompts, sampling, adapter initialisation and shuffling"
    )
    model: ModelSettings
    data: DataSettings
    reward: RewardSettings = Field(default_factory=RewardSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    method: Method = Field(default_factory=lambda: PRESETS["hapo"])
    training: TrainingSettings
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    benchmark: BenchmarkSettings = Field(
        default_factory=BenchmarkSettings, description="What python -m hapo_lite.evaluate does; training ignores it"
    )
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, name: str) -> str:
        return one_folder(name)

    @field_validator("method", mode="before")
    @classmethod
    def _start_from_preset(cls, method: Any) -> Any:
        if isinstance(method, str):
            method = {"preset": method}
        if not isinstance(method, dict):
            return method
        preset = str(method.get("preset", "hapo"))
        if preset not in PRESETS:
            raise ValueError(f"preset {preset[:60]!r} is not one of {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
        return {**dataclasses.asdict(PRESETS[preset]), **method}

    @model_validator(mode="after")
    def _rules(self) -> Recipe:
        for broken, sentence in (
            (
                self.model.activation_offload and not self.model.gradient_checkpointing,
                "model.activation_offload needs model.gradient_checkpointing: without it, weights would be moved too",
            ),
            (
                self.rollout.completions_per_prompt < 2,
                "rollout.completions_per_prompt must be at least 2: a group of one has no advantage to compute",
            ),
            (
                self.reward.overlong_buffer >= self.rollout.max_new_tokens,
                "reward.overlong_buffer must be smaller than rollout.max_new_tokens: else every completion is overlong",
            ),
            (
                self.training.updates_per_iteration
                > self.rollout.prompts_per_iteration * self.rollout.completions_per_prompt,
                "training.updates_per_iteration exceeds the completions of an iteration: some updates would be empty",
            ),
            (
                self.reward.function is None and self.reward.correct <= self.reward.wrong,
                "reward.correct must exceed reward.wrong: otherwise wrong answers are what is learned",
            ),
            (
                self.rollout.token_budget is not None and not self.rollout.dynamic_sampling,
                "rollout.token_budget has no effect without rollout.dynamic_sampling: set both or neither",
            ),
            (
                (self.rollout.top_p < 1.0 or self.rollout.top_k is not None) and self.method.importance != "truncated",
                "rollout.top_p below 1 or a rollout.top_k needs method.importance=truncated: tokens are then drawn "
                "from another distribution than the policy's, and without that weight the gradient is biased",
            ),
            (
                self.training.max_tokens is not None and self.training.schedule != "constant",
                "training.schedule must be constant with training.max_tokens: a run that ends by tokens does not know "
                "how many updates a schedule has to fill",
            ),
        ):
            if broken:
                raise ValueError(sentence)
        return self

    @property
    def token_budget(self) -> int:
        """Most completion tokens sampled in one iteration under dynamic sampling."""
        r = self.rollout
        return r.token_budget or 4 * r.prompts_per_iteration * r.completions_per_prompt * r.max_new_tokens

    def advice(self) -> list[str]:
        """Sentences about settings that are allowed but seldom meant."""
        notes = []
        method, updates = self.method, self.training.updates_per_iteration
        if updates == 1 and (method.redistribution or method.adaptive_clip):
            notes.append(
                "training.updates_per_iteration is 1, so every ratio is 1: redistribution can only suppress and "
                "adaptive clipping does nothing. Use 4 or more for HAPO."
            )
        if updates == 1 and method.eps_uncertain is not None:
            notes.append("training.updates_per_iteration is 1, so every ratio is 1: method.eps_uncertain does nothing.")
        if method.low_side == "positive" and not (
            method.adaptive_temperature or method.redistribution or method.adaptive_clip
        ):
            notes.append("method.low_side has no effect without adaptive_temperature, redistribution or adaptive_clip.")
        if method.trained_tokens == "uncertain" and method.redistribution:
            notes.append(
                "method.trained_tokens leaves out the certain tokens, which are all that redistribution can suppress."
            )
        if method.uncertain_among == "completion" and not (
            method.trained_tokens == "uncertain" or method.eps_uncertain is not None or method.needs_base
        ):
            notes.append("method.uncertain_among has no effect without trained_tokens, eps_uncertain or a divergence.")
        if method.preset.startswith("hapo") and self.reward.overlong_buffer:
            notes.append("HAPO's authors warn that it is sensitive to the overlong penalty (reward.overlong_buffer).")
        if self.reward.overlong_buffer and method.preset == "grpo":
            notes.append("reward.overlong_buffer is DAPO's; GRPO as published has no length penalty.")
        return notes

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides. Raises UserError with one sentence.

    path: a file, or the name of a shipped recipe, such as `tiny_cpu`.
    """
    path = find_recipe(path)
    settings = read_mapping(path, "recipe")
    if "arms" in settings:
        raise UserError(f"{path} compares several runs: use python -m hapo_lite.compare {path}")
    for override in overrides:
        apply_override(settings, override)
    settings.setdefault("name", path.stem)
    return parse_recipe(settings, str(path))


def find_recipe(path: str | Path) -> Path:
    """`path` itself, or the shipped recipe or comparison of that name where `path` is a plain name without a file.

    A plain name has neither a folder nor a suffix. Raises UserError if nothing shipped has that name.
    """
    path = Path(path)
    # os.path.isfile has no error for a name that is too long.
    if path.suffix or len(path.parts) != 1 or os.path.isfile(path):
        return path
    package = Path(str(files("hapo_lite")))
    # The wheel has the recipes within the package; a checkout has them beside it.
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parent / "recipes"
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if path.name not in shipped:
        raise UserError(f"there is no recipe at {path}; those that come with hapo_lite are {', '.join(shipped)}")
    return shipped[path.name]


def parse_recipe(settings: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping. Raises UserError naming the first field that is wrong."""
    return validate(Recipe, settings, where)


def departure(before: dict[str, Any], now: Recipe) -> str | None:
    """The first setting that makes `now` another run than `before`, an earlier recipe as a mapping; None: the same run.

    A setting that `before` lacks, as of an older version, had its default.
    """
    try:
        then = flatten(parse_recipe(before).model_dump(mode="json"))
    except UserError as error:
        return f"other settings than this version has ({error})"
    for key, value in flatten(now.model_dump(mode="json")).items():
        if then.get(key) != value and not key.startswith(MAY_CHANGE):
            return f"{key} = {then.get(key)}, the recipe now says {value}"
    return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists become text."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
    return flat


def describe_fields() -> str:
    """Every field with its type, default and meaning, one line each, for --help."""
    return "recipe fields:\n" + describe(Recipe)
