"""The sections of a recipe: every setting of a run but the method's, typed, with its bounds and its meaning."""

from __future__ import annotations

import datetime
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hapo_lite.errors import page
from hapo_lite.recipe.lora import LoraSettings
from hapo_lite.recipe.settings import NonNegative, Positive, Section, nearest

QWEN_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"


def one_folder(name: str) -> str:
    """`name` if it is the name of one folder. Raises ValueError if it is not, such as a path."""
    if not re.fullmatch(FOLDER_NAME, name):
        raise ValueError(
            "must be one folder name of at most 100 letters, digits and . _ + -: a run writes nowhere else"
        )
    return name


def in_home(path: str) -> str:
    """`path` with a leading ~ as the home folder, which a shell expands only at the start of a word."""
    return os.path.expanduser(path)


HomePath = Annotated[str, AfterValidator(in_home)]
"""A path, or a name that may be a path."""
FolderName = Annotated[str, AfterValidator(one_folder)]


class ModelSettings(Section):
    """The base model, how it is loaded, and its adapter."""

    name: HomePath = Field(
        description="Hub name or folder of a causal language model, or a bundled one: `tiny`, `tiny_sums`"
    )
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
        False,
        description="Keep the tensors of gradient_checkpointing in main memory: less on the card, somewhat slower",
    )
    chat_template_options: dict[str, bool | int | float | str | None] = Field(
        default_factory=dict, description="Variables for the chat template, such as {enable_thinking: false}"
    )
    chat_template_date: datetime.date | None = Field(
        None, description="The day that a chat template takes for today; null: the day on which the run started"
    )
    lora: LoraSettings = Field(default_factory=LoraSettings, description="Adapter")
    adapter: HomePath | None = Field(
        None,
        description="An adapter to train further: a run's folder, its adapter/ or a checkpoint, another folder of "
        "peft, or a hub name; null: a new one",
    )

    def without_adapter(self) -> ModelSettings:
        """The section without `adapter`, for a policy whose adapter's weights come from elsewhere."""
        return self.model_copy(update={"adapter": None})

    @field_validator("chat_template_date", mode="before")
    @classmethod
    def _no_number(cls, date: Any) -> Any:
        """Pydantic takes a number for seconds since 1970, which nobody means."""
        if isinstance(date, (int, float)):
            raise ValueError("must be a day such as 2026-01-31, or null")
        return date

    @property
    def offloads(self) -> bool:
        """Whether activations are moved. Without checkpointing the saved tensors include weights, which stay."""
        return self.activation_offload and self.gradient_checkpointing


class DataSettings(Section):
    """Where problems and their answers come from."""

    source: HomePath = Field(
        description="`tiny` or `tiny_sums` (built in), a local .parquet, .jsonl, .json or .csv file, or a hub data set"
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
    solution_column: str | None = Field(
        None, description="Column of the worked solution, for hapo_lite.sft; null: solution or answer, as found"
    )
    system_prompt: str | None = Field(
        QWEN_SYSTEM_PROMPT, description="System message where the data has none of its own; null: none"
    )
    limit: Positive | None = Field(None, description="Use only this many prompts: the first usable ones")
    max_prompt_tokens: Positive = Field(1024, description="Longer prompts are left out, and counted")


OWN_REWARDS = ("correct", "boxed", "length", "overlong")
"""The rewards that come with the kit."""
REWARD_NAME = r"[A-Za-z][A-Za-z0-9_-]{0,39}"
TAKEN = ("mean", "std", "correct_share")
"""Names of metrics of the whole reward, which a reward of its own cannot have."""


class NamedReward(Section):
    """One of several rewards. In a recipe it may also be written as text: the function alone."""

    name: str = Field(description="What it is called in metrics, traces and messages; as a rule the function's name")
    function: HomePath = Field(
        description=f"{', '.join(OWN_REWARDS)}, or your own as module:function (see {page('rewards.md')})"
    )
    weight: float = Field(1.0, description="Factor in the sum of the rewards; 0: only measured")
    timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, description="Deadline of one call of your own, seconds")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, reward: Any) -> Any:
        reward = {"function": reward} if isinstance(reward, str) else reward
        if isinstance(reward, dict) and "name" not in reward and isinstance(reward.get("function"), str):
            return {"name": reward["function"].rpartition(":")[2], **reward}
        return reward

    @field_validator("name")
    @classmethod
    def _can_name_a_metric(cls, name: str) -> str:
        if not re.fullmatch(REWARD_NAME, name):
            raise ValueError("must be at most 40 letters, digits and _ -, with a letter first")
        if name in TAKEN:
            raise ValueError(f"reward/{name} is a metric of the whole reward: choose another name")
        return name

    @field_validator("function")
    @classmethod
    def _is_known_or_elsewhere(cls, function: str) -> str:
        if ":" not in function and function not in OWN_REWARDS:
            raise ValueError(
                f"{function[:60]!r} is neither one of {', '.join(OWN_REWARDS)} nor of the form module:function"
                f"{nearest(function, OWN_REWARDS)}"
            )
        return function


class RewardSettings(Section):
    """What a completion earns, and the processes that grade it."""

    function: HomePath | None = Field(
        None, description=f"Your own reward as module:function (see {page('rewards.md')}); null: grade the answer"
    )
    functions: tuple[NamedReward, ...] = Field(
        (),
        description="Several rewards, in place of all others: a list of functions or of {name, function, weight, "
        "timeout_s}",
    )
    combine: Literal["sum", "normalise_each"] = Field(
        "sum",
        description="Weighted sum of reward.functions; normalise_each: of their advantages, each in its group (GDPO)",
    )
    correct: float = Field(1.0, description="Reward of a correct answer")
    wrong: float = Field(0.0, description="Reward of any other outcome")
    overlong_buffer: NonNegative = Field(
        0, description="DAPO's soft overlong penalty: its ramp, in tokens before max_new_tokens; 0: off"
    )
    overlong_penalty: Annotated[float, Field(ge=0)] = Field(1.0, description="Penalty at the end of that ramp")
    timeout_s: Annotated[float, Field(gt=0)] = Field(5.0, description="Deadline of one grading, seconds")
    workers: Positive = Field(2, description="Grading processes")

    @field_validator("functions", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, functions: Any) -> Any:
        return [functions] if isinstance(functions, (str, dict)) else functions

    @field_validator("functions")
    @classmethod
    def _names_differ(cls, functions: tuple[NamedReward, ...]) -> tuple[NamedReward, ...]:
        names = [reward.name for reward in functions]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rewards are named {name}: give each a name of its own")
        return functions

    @property
    def normalised(self) -> dict[str, float]:
        """The weights of the rewards whose advantages are summed, by name; empty if the rewards themselves are."""
        if self.combine == "sum":
            return {}
        return {reward.name: reward.weight for reward in self.functions if reward.weight != 0.0}


class RolloutSettings(Section):
    """How the completions of an iteration are sampled."""

    engine: Literal["transformers", "paged", "vllm", "unsloth"] = Field(
        "transformers",
        description="What samples: the policy with the kit's decoding loop (transformers) or with transformers' "
        "continuous batching (paged), vLLM, or Unsloth",
    )
    engine_memory: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.4, description="Share of the GPU's memory for vLLM, which has a base of its own and sleeps during the update"
    )
    prompts_per_iteration: Positive = Field(32, description="P, the prompts of an iteration")
    completions_per_prompt: int = Field(8, description="G, the size of a group, at least 2")
    max_new_tokens: Positive = Field(1024, description="Longest completion, tokens")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="T_base, the sampling temperature at h = 0")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens that hold this much probability; 1: from all"
    )
    top_k: Positive | None = Field(
        None,
        description="Sample from the k likeliest tokens; null: all. This, or top_p below 1, needs "
        "method.importance=truncated",
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Sample from the tokens at least this many times as likely as the likeliest one; 0: from all. "
        "Above 0 it needs method.importance=truncated",
    )
    batch_size: Positive = Field(64, description="Completions sampled at once; bounds the memory of the KV cache")
    unpacked_base: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Unpack a 4-bit base once a rollout, instead of in every step, and keep it until the rollout ends; "
        "auto: where memory allows, and not again in this run once memory has run out beside it",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="Replay recorded decoding steps on a GPU, in engine transformers; auto: not before that has been "
        "measured on a card",
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
    """How long a run trains, and its optimiser steps."""

    iterations: Positive = Field(description="Iterations: rollout, score, update")
    max_tokens: Positive | None = Field(
        None, description="End after the iteration in which this many completion tokens have been sampled; null: never"
    )
    updates_per_iteration: Positive = Field(4, description="Optimiser steps on each iteration's completions")
    micro_batch_tokens: Positive = Field(
        16384,
        description="Padded tokens, prompt included, in one forward and backward; changes memory, and the "
        "result by rounding alone",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field("adamw", description="Optimiser")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-5, description="Peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Learning rate after the warm-up")
    warmup_updates: NonNegative = Field(10, description="Optimiser steps of linear warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's decoupled weight decay")
    max_skipped: Positive = Field(
        10, description="Updates skipped in a row, for numbers that are not finite, after which the run stops"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient clipping, global L2 norm")


class SftSettings(Section):
    """The supervised warm start, `python -m hapo_lite.sft`."""

    epochs: Annotated[float, Field(gt=0)] = Field(1.0, description="Passes over the worked solutions")
    updates: Positive | None = Field(None, description="Optimiser steps; null: as many as `epochs` takes")
    batch_size: Positive = Field(32, description="Worked solutions of an optimiser step")
    max_solution_tokens: Positive | None = Field(
        None, description="Longer solutions are left out, and counted; null: rollout.max_new_tokens"
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02, description="Share of the worked solutions that is kept aside, for the loss on them; 0: none"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-4, description="Peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Learning rate after the warm-up")
    warmup_updates: NonNegative = Field(10, description="Optimiser steps of linear warm-up")


class EvaluationSettings(Section):
    """The held-out prompts that a run measures itself on."""

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

    name: FolderName = Field(description="aime24, ..., or a name of your own: the folder that the results go to")
    source: HomePath | None = Field(None, description="Same as data.source; null: what the name stands for")
    config: str | None = Field(None, description="Same as data.config")
    revision: str | None = Field(None, description="Same as data.revision")
    split: str = Field("test", description="Same as data.split")
    problem_column: str | None = Field(None, description="Same as data.problem_column")
    answer_column: str | None = Field(None, description="Same as data.answer_column")

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


class BenchmarkSettings(Section):
    """What `python -m hapo_lite.evaluate` asks, and how it samples."""

    suites: tuple[SuiteSettings, ...] | None = Field(
        None,
        description="List of names, files, NAME=FILE or {name, source, config, split, problem_column, answer_column}; "
        "null: the built-in task for a run on it, else the six of the paper",
    )
    limit: Positive | None = Field(None, description="Use only this many prompts of each suite: the first ones")
    samples: Positive = Field(8, description="Completions per prompt: the n of avg@n, pass@n and maj@n")
    temperature: Annotated[float, Field(gt=0)] = Field(0.5, description="Sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="Sample from the likeliest tokens that hold this much probability; 1: from all"
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
    """When a run saves its state, and whether it continues from it."""

    every: NonNegative = Field(10, description="Iterations between checkpoints; 0: only at the end or when interrupted")
    keep: Positive = Field(2, description="Newest checkpoints kept")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue this run from its newest checkpoint; never: refuse a folder with a run"
    )


class LoggingSettings(Section):
    """What a run shows and records of itself."""

    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field("none", description="Tracker")
    table_rows: NonNegative = Field(8, description="Completions in the tracker's table, each iteration and evaluation")
    traces_per_iteration: NonNegative = Field(4, description="Completions whose tokens are recorded each iteration")
    progress: bool = Field(True, description="Show what the run is doing, and the bar of iterations")
