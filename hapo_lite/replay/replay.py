"""A skipped step once more: what it was given, then its forward and backward, micro-batch by micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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


def replay(path: Path) -> str:
    """Print what is found, and return in words where the first non-finite number arises."""
    saved = load_step(path)
    step = saved.step
    what = f"update {step.step}" if step.step else "before the first update"
    print(f"iteration {step.iteration}, {what}, skipped: {step.reason}")
    print(f"{len(step.graded)} completions in {len(step.batches)} micro-batches")
    begins = given(saved)
    print(f"what it was given: {begins or 'finite'}")
    if begins is None:
        update = rebuilt(saved, path)
        for number, batch in enumerate(step.batches, 1):
            found = micro_batch(update, step, batch)
            print(f"micro-batch {number}: {found or 'finite'}")
            begins = begins or found
    begins = begins or HERE
    print(f"begins: {begins}")
    return begins


def rebuilt(saved: SavedStep, path: Path) -> Update:
    """The update that the step belongs to, with its adapter and its loss scale, on this machine."""
    recipe = saved.recipe
    recipe = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"report_to": "none"})})
    accelerator = make_accelerator(recipe)
    policy = load_policy(recipe.model, recipe.seed, accelerator.device, engine=recipe.rollout.engine)
    put_adapter(policy, saved.adapter, path)
    learner = make_learner(recipe.training, policy, accelerator)
    if (scaler := learner.optimizer.scaler) is not None:
        scaler.load_state_dict(scaler.state_dict() | {"scale": saved.step.loss_scale})
    resources = Resources(accelerator, Processes(accelerator, sharded=False), OomRetry(accelerator), Progress())
    temperature, max_norm = recipe.rollout.temperature, recipe.training.max_grad_norm
    return Update(policy, recipe.method, temperature, max_norm, learner, resources)


def given(saved: SavedStep) -> str | None:
    """The first non-finite input of the step, in words."""
    graded, experience = saved.step.graded, saved.step.experience
    completions = graded.completions
    try:
        check_rewards(graded)
        for name, weight in saved.adapter.items():
            if odd := int((~torch.isfinite(weight)).sum()):
                return f"{odd} of {weight.numel()} numbers of the adapter's {name}"
        for name in SAMPLED:
            check_tokens(f"sampler's {name}", [getattr(c, name) for c in completions], completions)
        if experience is not None:
            for name in BY_TOKEN:
                if (rows := getattr(experience, name)) is not None:
                    check_tokens(name, rows, completions)
    except NotFinite as found:
        return str(found)
    for i, value in enumerate(experience.advantage.tolist() if experience is not None else ()):
        if not math.isfinite(value):
            return f"the advantage of {describe(completions[i])} is {value}"
    return None


def micro_batch(update: Update, step: SkippedStep, batch: list[int]) -> str | None:
    """Where the first non-finite number of a micro-batch's forward and backward arises; None if all are finite."""
    completions = step.graded.select(batch).completions
    with watching(update.policy.model) as seen:
        if step.experience is None:
            with torch.no_grad():
                logp, entropy = logprobs(update.policy, completions, update.temperature)
            rows = {"log-probability": logp, "entropy": entropy}
            loss = torch.zeros(())
        else:
            loss, outcomes = update.gradients(step.experience, [batch], step.denominator)
            kinds = {"log-probability": "logp", "ratio": "ratio", "credit": "credit"}
            rows = {kind: [getattr(outcomes[i], name) for i in batch] for kind, name in kinds.items()}
    if seen["forward"]:
        return f"forward, in the output of {seen['forward']}"
    try:
        for kind, values in rows.items():
            check_tokens(kind, [v[: c.length].cpu() for v, c in zip(values, completions, strict=True)], completions)
    except NotFinite as found:
        return f"after the last layer: {found}"
    if not torch.isfinite(loss):
        return f"the loss is {float(loss)}, though the numbers of every token are finite"
    if seen["backward"]:
        return f"backward, in the gradient of the output of {seen['backward']}"
    for name, p in update.policy.trainable().items():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            return f"backward, in the gradient of {name}"
    return None


@contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, str]]:
    """Names of the first layers whose output, and whose output's gradient, is not finite: "forward", "backward"."""
    seen = {"forward": "", "backward": ""}

    def note(way: str, name: str, tensor: Tensor) -> None:
        if not seen[way] and not bool(torch.isfinite(tensor).all()):
            seen[way] = name

    def hook(name: str):
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    note("forward", name, tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: note("backward", name, gradient))

        return look

    # Layers without layers inside: where two are one inside the other, the inner one is the place.
    leaves = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is None]
    handles = [m.register_forward_hook(hook(name)) for name, m in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def put_adapter(policy: Policy, adapter: dict[str, Tensor], path: Path) -> None:
    """The step's weights into the policy. Raises UserError if they are of another model."""
    parameters = policy.trainable()
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in adapter.items()}:
        raise UserError(f"the adapter in {path} does not fit the model that its recipe names: has the model changed?")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(adapter[name])
