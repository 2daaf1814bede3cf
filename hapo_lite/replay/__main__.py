"""Replay a step that was skipped: `python -m hapo_lite.replay runs/NAME/replay/000012-3.safetensors`.

It looks at what the step was given, then runs its forward and backward again, micro-batch by micro-batch, and says
where the first number arises that is not finite.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hapo_lite.cli import program_name, run_command
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.runs.skipped import BY_TOKEN, SAMPLED, SkippedStep, load_step
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collector
from hapo_lite.train.finite import NotFinite, check_tokens, describe
from hapo_lite.train.loop import Loop

HERE = "every number is finite here: what it was does not repeat on this machine, with these versions"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=program_name("replay"), description=__doc__.split("\n\n")[1])
    parser.add_argument("file", type=Path, help="a file of runs/NAME/replay/")
    replay(parser.parse_args(argv).file)


def replay(path: Path) -> str:
    """Print what is found, and return where the first number that is not finite arises, in words."""
    step, adapter, recipe = load_step(path)
    what = f"update {step.step}" if step.step else "before the first update"
    print(f"iteration {step.iteration}, {what}, skipped: {step.reason}")
    print(f"{len(step.completions)} completions in {len(step.batches)} micro-batches")
    begins = given(step, adapter)
    print(f"what it was given: {begins or 'finite'}")
    if begins is None:
        recipe = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"report_to": "none"})})
        accelerator = make_accelerator(recipe)
        policy = load_policy(recipe.model, recipe.seed, accelerator.device, engine=recipe.rollout.engine)
        put_adapter(policy, adapter, path)
        collector = Collector(engine=None, scorer=None, accelerator=accelerator)
        loop = Loop(recipe, policy, collector, stream=None, held_out=(), accelerator=accelerator)
        if (scaler := loop.optimizer.scaler) is not None:
            scaler.load_state_dict(scaler.state_dict() | {"scale": step.loss_scale})
        for number, batch in enumerate(step.batches, 1):
            found = micro_batch(loop, step, batch)
            print(f"micro-batch {number}: {found or 'finite'}")
            begins = begins or found
    begins = begins or HERE
    print(f"begins: {begins}")
    return begins


def given(step: SkippedStep, adapter: dict[str, Tensor]) -> str | None:
    """The first input of the step that is not finite, in words."""
    for i, reward in enumerate(step.rewards.tolist()):
        if not torch.isfinite(step.rewards[i]):
            return f"the reward of {describe(step.completions[i])} is {reward}"
    for name, weight in adapter.items():
        if odd := int((~torch.isfinite(weight)).sum()):
            return f"{odd} of {weight.numel()} numbers of the adapter's {name}"
    try:
        for name in SAMPLED:
            check_tokens(f"sampler's {name}", [getattr(c, name) for c in step.completions], step.completions)
        for name in BY_TOKEN if step.scored else ():
            if (rows := getattr(step.scored, name)) is not None:
                check_tokens(name, rows, step.completions)
    except NotFinite as found:
        return str(found)
    for i, value in enumerate(step.advantage.tolist() if step.advantage is not None else ()):
        if not torch.isfinite(step.advantage[i]):
            return f"the advantage of {describe(step.completions[i])} is {value}"
    return None


def micro_batch(loop: Loop, step: SkippedStep, batch: list[int]) -> str | None:
    """Where the first number of a micro-batch's forward and backward arises that is not finite; None if all are."""
    completions = step.completions
    with watching(loop.policy.model) as seen:
        if step.scored is None or step.advantage is None:
            with torch.no_grad():
                logp, entropy = loop._logprobs([completions[i] for i in batch])
            rows = {"log-probability": logp, "entropy": entropy}
            loss = torch.zeros(())
        else:
            loss, outcomes = loop.gradients([batch], completions, step.advantage, step.scored, step.denominator)
            kinds = {"log-probability": "logp", "ratio": "ratio", "credit": "credit"}
            rows = {kind: [getattr(outcomes[i], name) for i in batch] for kind, name in kinds.items()}
    if seen["forward"]:
        return f"forward, in the output of {seen['forward']}"
    try:
        for kind, values in rows.items():
            lengths = [completions[i].length for i in batch]
            check_tokens(
                kind, [v[:n].cpu() for v, n in zip(values, lengths, strict=True)], [completions[i] for i in batch]
            )
    except NotFinite as found:
        return f"after the last layer: {found}"
    if not torch.isfinite(loss):
        return f"the loss is {float(loss)}, though the numbers of every token are finite"
    if seen["backward"]:
        return f"backward, in the gradient of the output of {seen['backward']}"
    for name, p in loop.policy.trainable().items():
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


def command() -> int:
    """Entry point of `hapo-replay`; returns the exit code."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(command())
