"""Steps of a training loop, and what tells two ends of one apart."""

from __future__ import annotations

import hashlib

import pytest
import torch

from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.interrupt import Interrupted
from hapo_lite.train import run


def digest(tensors) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def adapter_digest(loop) -> str:
    return digest(loop.policy.trainable().values())


def run_steps(loop, count):
    state, lines = TrainState(), []
    for _ in range(count):
        state, metrics, _ = loop.step(state)
        lines.append(metrics)
    return state, lines


def train_into_the_third(recipe, monkeypatch):
    """Train, and be interrupted as the third iteration begins."""
    original = run.Loop.step

    def step(loop, state):
        if state.iteration == 2:
            raise Interrupted(15)
        return original(loop, state)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(run.Loop, "step", step)
        run.train(recipe)
