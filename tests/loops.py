"""Steps of a training loop, and what tells two ends of one apart."""

from __future__ import annotations

import hashlib

import torch

from hapo_lite.runs.checkpoint import TrainState


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
