"""Predicted memory against what torch's allocator gives out on the CPU, where every allocation can be counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from hapo_lite.model.policy import Policy
from hapo_lite.model.unpacked import Unpacking
from hapo_lite.recipe import Recipe
from hapo_lite.records import EncodedPrompt, Prompt, Sequences
from hapo_lite.rollout import draws
from hapo_lite.rollout.engine import Request, make_engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.train.memory.live import tensors_of, total_bytes
from hapo_lite.train.memory.predict import Predictor, Stage, unpacking, worst_case

RESIDENT = ("base weights", "adapter", "optimiser", "gradients")


def allocated(work) -> int:
    """The most bytes that torch's allocator had given out at once during `work`, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    now = peak = 0
    events = list(seen.profiler.kineto_results.experimental_event_tree())
    sizes = []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(sizes):
        now += size
        peak = max(peak, now)
    del kept
    return peak


def check_stages(recipe: Recipe, policy: Policy, rollout: bool) -> None:
    """What is predicted of a recipe's worst case is what its policy allocates, stage by stage."""
    predictor = Predictor(recipe, "cpu")
    sizes = worst_case(recipe, predictor.context)
    sampling, scoring, update = predictor.stages()
    if policy.dense is not None:
        # The prediction counts no copy that is left open, since it is told of no room.
        asked = unpacking(recipe)
        policy.dense.wanted = Unpacking.NEVER if asked.left_open else asked
    parameters = list(policy.trainable().values())
    assert sampling.parts["adapter"] == total_bytes(parameters)
    assert sampling.parts["base weights"] + sampling.parts["adapter"] == total_bytes(tensors_of(policy.model))
    length = sizes.width - sizes.prompt
    batch = Sequences(
        torch.randint(0, 8192, (sizes.batch, sizes.width)),
        torch.full((sizes.batch,), sizes.prompt),
        torch.full((sizes.batch,), length),
        torch.ones(sizes.batch, length).bool(),
    )

    def learn():
        policy.completion_logprobs(batch)[0].sum().backward()

    def score():
        with torch.no_grad(), policy.unpacked():
            policy.completion_logprobs(batch)

    for p in parameters:
        p.grad = torch.zeros_like(p)  # as after the first of a step's micro-batches
    check(update, learn)
    check(scoring, score)
    if not rollout:
        return
    endless = replace(policy, stop_ids=(-1,))
    prompts = [EncodedPrompt(i, Prompt(str(i), (), ""), tuple(range(sizes.prompt - i))) for i in range(sizes.prompts)]
    requests = [Request(prompt, sample) for prompt in prompts for sample in range(sizes.rows // sizes.prompts)]
    engine = make_engine(recipe, endless)
    key = draws.DrawKey(0, draws.Stage.TRAINING, 1)
    check(sampling, lambda: engine.sample(requests, AdaptiveTemperature(None), key))


def check(stage: Stage, work) -> None:
    """What is resident is known exactly: the tenth is of the rest."""
    predicted = stage.total - sum(stage.parts.get(name, 0) for name in RESIDENT)
    found = allocated(work)
    print(f"{stage.name}: predicted / allocated = {predicted / found:.3f}")  # docs/memory.md has these
    assert predicted == pytest.approx(found, rel=0.1), stage.name
