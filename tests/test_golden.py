"""The paper's equations on three random batches worked out in float64: every intermediate value, and the gradient."""

import json
from pathlib import Path

import pytest
import torch

from hapo_lite.algo.advantage import group_advantage, redistribute
from hapo_lite.algo.clipping import clip_bounds
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, method_loss, policy_loss
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.algo.tokens import TokenSignals

CASES = json.loads((Path(__file__).parent / "hapo_cases.json").read_text())


@pytest.fixture(params=range(len(CASES)))
def case(request):
    def tensors(tree):
        return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in tree.items()}

    return tensors(CASES[request.param]["inputs"]), tensors(CASES[request.param]["expected"])


def assert_close(value, expected, mask=None, tolerance=1e-6):
    difference = (value - expected).abs()
    assert float((difference if mask is None else difference * mask).max()) <= tolerance


def test_every_piece(case):
    given, expected = case
    mask = given["mask"]
    signal = EntropySignal.fit(given["entropy"], mask, given["quantile"], given["floor"])
    for name, value in expected["signal"].items():
        assert getattr(signal, name) == pytest.approx(value, abs=1e-6)
    h = signal.normalize(given["entropy"])
    assert_close(h, expected["h"], mask)
    temperature = adaptive_temperature(given["entropy"], signal, given["base_temperature"], given["tau"])
    assert_close(temperature, expected["temperature"], mask)
    groups = given["rewards"], given["lengths"], given["group_ids"]
    by_token = group_advantage(*groups, level="token")
    assert_close(by_token, expected["advantage_token_level"])
    assert_close(group_advantage(*groups, level="sequence"), expected["advantage_sequence_level"])
    bounds = given["eps_low"], given["eps_high"]
    lower, upper = clip_bounds(h, *bounds)
    assert_close(lower, expected["clip_lower"], mask)
    assert_close(upper, expected["clip_upper"], mask)

    logp = given["logp"].requires_grad_()
    ratio = (logp - given["old_logp"]).exp()
    credit = redistribute(by_token[:, None].expand_as(h), h, ratio, *bounds)
    assert_close(credit, expected["advantage_redistributed"], mask)
    out = policy_loss(
        logp, given["old_logp"], credit, mask, lower, upper, denominator=mask.sum(), dual_clip=given["dual_clip"]
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert_close(logp.grad, expected["grad_logp"], tolerance=1e-5)


def test_the_preset_is_the_sum_of_its_pieces(case):
    given, expected = case
    mask = given["mask"]
    entropy = given["entropy"]
    signal = EntropySignal.fit(entropy, mask)
    tokens = TokenSignals(signal.normalize(entropy), entropy, signal.above(entropy), torch.ones(len(entropy)))
    advantage = group_advantage(given["rewards"], given["lengths"], given["group_ids"], "token")
    logp = given["logp"].requires_grad_()
    out, _ = method_loss(PRESETS["hapo"], logp, LossInputs(given["old_logp"], advantage, tokens, mask), mask.sum())
    out.loss.backward()
    assert_close(logp.grad, expected["grad_logp"], tolerance=1e-5)
