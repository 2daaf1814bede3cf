"""A decoding step keeps its cost: operators, bytes, and waits, counted by benchmarks/decode_cost.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.decode_cost import LARGE, RANK, ROWS, SMALL, TOKENS, least_bytes, run_cost, shape_cost, small_policy
from hapo_lite.rollout.decoding import LOOK_EVERY


@pytest.mark.parametrize(("dtype", "operators", "share"), [("float32", 300, 2.1), ("bfloat16", 368, 3.3)])
def test_a_step_of_the_small_model(dtype, operators, share):
    dtype = getattr(torch, dtype)
    cost = run_cost(small_policy(dtype))
    assert cost.operators <= operators
    assert cost.bytes <= share * least_bytes(SMALL, 16, 48 + 9 + 8, dtype.itemsize, 8)
    assert cost.waits == 1 / LOOK_EVERY


@pytest.mark.parametrize(("name", "share"), [("1.5B", 1.45), ("7B", 1.25), ("8B", 1.2)])
def test_a_step_of_a_large_model(name, share):
    """With 2 and 4 layers, from which the whole model follows."""
    shape = LARGE[name]
    two, four = (shape_cost(replace(shape, layers=layers)) for layers in (2, 4))
    layer = (four.operators - two.operators) / 2
    assert layer <= 54 and two.operators - 2 * layer <= 118
    moved = two.bytes + (four.bytes - two.bytes) / 2 * (shape.layers - 2)
    assert moved <= share * least_bytes(shape, ROWS, TOKENS, 2, RANK)
    assert two.waits == 1 / LOOK_EVERY


def test_the_way_of_other_models_copies_the_cache_for_every_head():
    shape = replace(LARGE["1.5B"], layers=2)
    fixed, grows = shape_cost(shape), shape_cost(shape, grows=True)
    assert grows.bytes - fixed.bytes > 2 * 1.8e9 and grows.operators - fixed.operators >= 50
