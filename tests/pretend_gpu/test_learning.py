"""Scoring and update of every method on a pretended GPU, forward and backward, in bf16 and with fp16's loss scaling."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode_cost import small_policy
from hapo_lite.algo.methods import PRESETS
from hapo_lite.records import Sequences, put
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.collect import Collected
from hapo_lite.train.observer import Observer
from tests.conftest import score
from tests.pretend_gpu.card import found_by_triton, on_card
from tests.pretend_gpu.conftest import KINDS
from tests.pretend_gpu.device import CUDA, Watch

A_MICRO_BATCH = 4
"""Waits of a micro-batch: transformers asks whether sequences are packed, the real tokens are found among the padding,
the head asks for the range of the targets, and the results come to the host in one copy."""
A_STEP = 2
"""Waits of an optimiser step: the loss and the gradient's norm, which decide whether the step is taken."""
A_SCALED_STEP = 2
"""More waits of a step in fp16: the loss scale, which a skipped step records, and whether a gradient has overflowed."""

CASES = [(kind, preset) for preset in PRESETS for kind in KINDS if kind != "bf16, NF4" or preset in ("hapo", "archer")]
"""Every method in both dtypes. A packed base with two of them, one of which reads it without its adapter too."""


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_head_of_several_tiles(kind, stage):
    """Qwen2's shape with a vocabulary of 18,992 in tiles of 4,096, forward and backward."""
    policy = on_card(small_policy({"bf16": torch.bfloat16, "fp16": torch.float16}[kind]))
    lengths = torch.tensor([9, 4])
    with stage("update: large vocabulary", kind) as seen:
        mask = torch.arange(9)[None] < lengths[:, None]
        ids, starts = torch.arange(24).view(2, 12), torch.tensor([3, 5])
        logp, _ = policy.completion_logprobs(Sequences(*(put(t, CUDA) for t in (ids, starts, lengths, mask))), 0.9)
        logp.sum().backward()
        seen.budget = A_MICRO_BATCH - 1  # the results stay on the card
    gradients = [p.grad for name, p in policy.trainable().items() if "lora_B" in name]
    assert all(float(gradient.inner.norm()) > 0 for gradient in gradients)


@pytest.fixture(scope="module")
def collected() -> dict[str, Collected]:
    """What the first iteration samples, by kind: it is the same for all methods."""
    return {}


@pytest.mark.parametrize(("kind", "preset"), CASES)
def test_scoring_and_update(kind, preset, stage, make_loop, collected):
    learn(kind, preset, stage, make_loop, collected)


def test_with_tritons_kernel(stage, make_loop, collected):
    with found_by_triton():
        learn("bf16", "hapo", stage, make_loop, collected, ", Triton")


def learn(kind, preset, stage, make_loop, collected, suffix=""):
    method, state = PRESETS[preset], TrainState(iteration=1)
    with Watch():
        loop = make_loop(kind, f"method={preset}", "training.micro_batch_tokens=256")
        if kind not in collected:
            collected[kind] = loop.sample(state)
    with stage(f"scoring: {preset}{suffix}", kind) as seen:
        plan, experience = score(loop, collected[kind], 1)
        passes = 2 if method.needs_base else 1
        seen.budget = A_MICRO_BATCH * passes * sum(map(len, plan.parts))
    parameters = loop.policy.trainable()
    before = {name: p.inner.clone() for name, p in parameters.items()}
    with stage(f"update: {preset}{suffix}", kind) as seen:
        updated = loop.update.run(experience, plan, state, Observer())
        steps = len(plan.updates)
        seen.budget = A_MICRO_BATCH * sum(map(len, plan.updates)) + A_STEP * steps
        seen.budget += A_SCALED_STEP * steps if kind == "fp16" else 0
    assert updated.taken == steps == 2
    moved = {name for name, p in parameters.items() if bool((p.inner != before[name]).any())}
    assert {name for name in parameters if "lora_B" in name} <= moved
    assert all(p.device.type == "cuda" for p in parameters.values())
