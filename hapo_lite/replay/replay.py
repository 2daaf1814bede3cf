"""Repeats a skipped step: checks its inputs, then runs its forward and backward, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.runs.progress import Progress
from hapo_lite.runs.skipped import BY_TOKEN, SAMPLED, SavedStep, SkippedStep, load_step
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.finite import NotFinite, check_rewards, check_tokens, describe
from hapo_lite.train.oom_retry import OomRetry
from hapo_lite.train.optimizer import make_learner
from hapo_lite.train.processes import Processes
from hapo_lite.train.resources import Resources
from hapo_lite.train.scoring import logprobs
from hapo_lite.train.update import Update

HERE = "every number is finite here: what it was does not repeat on this machine, with these versions"
"""The result if no number of the repeated step is nan or inf."""


def replay(path: Path) -> str:
    """Repeat the step in the file `path`, print each check, and return where the first non-finite number arises.

    Raises UserError if the file cannot be used.
    """
    saved = load_step(path)
    step = saved.step
    what = f"update {step.step}" if step.step else "before the first update"
    print(f"iteration {step.iteration}, {what}, skipped: {step.reason}")
    print(f"{len(step.graded)} completions in {len(step.batches)} micro-batches")
    if saved.recipe.model.adapter is not None:
        print(f"the run went on from the adapter {saved.recipe.model.adapter}")
    origin = problem_in_inputs(saved)
    print(f"what it was given: {origin or 'finite'}")
    if origin is None:
        update = rebuild_update(saved, path)
        for number, batch in enumerate(step.batches, 1):
            problem = problem_in_micro_batch(update, step, batch)
            print(f"micro-batch {number}: {problem or 'finite'}")
            origin = origin or problem
    origin = origin or HERE
    print(f"begins: {origin}")
    return origin


def rebuild_update(saved: SavedStep, path: Path) -> Update:
    """The update that the step belongs to, with its adapter and its loss scale, on this machine."""
    logging = saved.recipe.logging.model_copy(update={"report_to": "none"})
    recipe = saved.recipe.model_copy(update={"logging": logging})
    accelerator = make_accelerator(recipe)
    model = recipe.model.without_adapter()  # the file has the adapter's weights
    policy = load_policy(model, recipe.seed, accelerator.device, engine=recipe.rollout.engine)
    put_adapter(policy, saved.adapter, path)
    learner = make_learner(recipe.training, policy, accelerator)
    scaler = learner.optimizer.scaler
    if scaler is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": saved.step.loss_scale})
    resources = Resources(accelerator, Processes(accelerator, sharded=False), OomRetry(accelerator), Progress())
    return Update(policy, recipe.method, recipe.rollout, recipe.training.max_grad_norm, learner, resources)


def problem_in_inputs(saved: SavedStep) -> str | None:
    """The first non-finite input of the step, in words; None if all are finite."""
    graded, experience = saved.step.graded, saved.step.experience
    completions = graded.completions
    try:
        check_rewards(graded)
        for name, weight in saved.adapter.items():
            count = int((~torch.isfinite(weight)).sum())
            if count:
                return f"{count} of {weight.numel()} numbers of the adapter's {name}"
        for name in SAMPLED:
            check_tokens(f"sampler's {name}", [getattr(c, name) for c in completions], completions)
        if experience is None:
            return None
        for name in BY_TOKEN:
            rows = getattr(experience, name)
            if rows is not None:
                check_tokens(name, rows, completions)
    except NotFinite as found:
        return str(found)
    for completion, value in zip(completions, experience.advantage.tolist(), strict=True):
        if not math.isfinite(value):
            return f"the advantage of {describe(completion)} is {value}"
    return None


def problem_in_micro_batch(update: Update, step: SkippedStep, batch: list[int]) -> str | None:
    """Where the first non-finite number of a micro-batch's forward and backward arises; None if all are finite."""
    with watching(update.policy.model) as layers:
        result = run_micro_batch(update, step, batch)
    if layers.forward:
        return f"forward, in the output of {layers.forward}"
    try:
        for kind, rows in result.by_token.items():
            check_tokens(kind, rows, step.graded.select(batch).completions)
    except NotFinite as found:
        return f"after the last layer: {found}"
    if not math.isfinite(result.loss):
        return f"the loss is {result.loss}, though the numbers of every token are finite"
    if layers.backward:
        return f"backward, in the gradient of the output of {layers.backward}"
    for name, p in update.policy.trainable().items():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            return f"backward, in the gradient of {name}"
    return None


@dataclass(frozen=True)
class MicroBatchResult:
    """by_token: numbers of each completion by kind, [T] each, on the CPU. loss: 0 for a step that was not scored."""

    by_token: dict[str, list[Tensor]]
    loss: float


def run_micro_batch(update: Update, step: SkippedStep, batch: list[int]) -> MicroBatchResult:
    """Forward and backward of a micro-batch; the forward alone for a step that was not scored."""
    if step.experience is None:
        completions = step.graded.select(batch).completions
        with torch.no_grad():
            logp, entropy = logprobs(update.policy, completions, update.rollout.temperature)
        lengths = [completion.length for completion in completions]
        by_token = {
            "log-probability": [row[:length].cpu() for row, length in zip(logp, lengths, strict=True)],
            "entropy": [row[:length].cpu() for row, length in zip(entropy, lengths, strict=True)],
        }
        return MicroBatchResult(by_token, 0.0)
    loss, outcomes = update.gradients(step.experience, [batch], step.denominator)
    by_token = {
        "log-probability": [outcomes[i].logp for i in batch],
        "ratio": [outcomes[i].ratio for i in batch],
        "credit": [outcomes[i].credit for i in batch],
    }
    return MicroBatchResult(by_token, float(loss))


class NonFiniteLayers:
    """Names of the first layers with a non-finite output (forward) or output gradient (backward); "" for none."""

    def __init__(self) -> None:
        self.forward = ""
        self.backward = ""

    def check_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Check the output of the layer `name`, and later its gradient. A forward hook, once `name` is bound."""
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if not self.forward and not bool(torch.isfinite(tensor).all()):
                self.forward = name
            if tensor.requires_grad:
                tensor.register_hook(partial(self.check_gradient, name))

    def check_gradient(self, name: str, gradient: Tensor) -> None:
        """Check the gradient of an output of the layer `name`."""
        if not self.backward and not bool(torch.isfinite(gradient).all()):
            self.backward = name


@contextmanager
def watching(model: nn.Module) -> Iterator[NonFiniteLayers]:
    """A context that finds the first layers of `model` with non-finite outputs or gradients."""
    layers = NonFiniteLayers()
    # Only layers without layers inside are watched, so that the innermost one is named, and adapted layers, which do
    # not call the two factors inside (`model/lora.py`).
    watched = [
        (name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer) or next(m.children(), None) is None
    ]
    handles = [m.register_forward_hook(partial(layers.check_output, name)) for name, m in watched]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def put_adapter(policy: Policy, adapter: dict[str, Tensor], path: Path) -> None:
    """Copy the step's weights into the policy. Raises UserError if they belong to another model. path: their file."""
    parameters = policy.trainable()
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in adapter.items()}:
        raise UserError(f"the adapter in {path} does not fit the model that its recipe names: has the model changed?")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(adapter[name])
