"""Properties of the entropy signal and of the adaptive temperature, and the paper's example of the wrong sign."""

import math

import pytest
import torch

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature


def fit(values, **options):
    entropy = torch.tensor([values], dtype=torch.float64)
    return EntropySignal.fit(entropy, torch.ones_like(entropy), **options), entropy


def test_certain_tokens_are_negative():
    # The public code gives the most certain of these six tokens +1. Here the pivot is round(0.8 * 5) = the fifth: 1.0.
    signal, entropy = fit([2.0, 1.0, 0.5, 0.1, 0.01, 1e-4])
    h = signal.normalize(entropy)[0].tolist()
    assert signal.pivot == pytest.approx(math.log(1.0))
    assert h[0] == pytest.approx(1.0)
    assert h[1] == 0.0
    assert h[5] == pytest.approx(-1.0)
    assert h[3] == pytest.approx(math.log(0.1) / -math.log(1e-4))
    assert h == sorted(h, reverse=True)


def test_sides_without_tokens_give_zero():
    signal, entropy = fit([0.5, 0.5, 0.5])
    assert signal.high == signal.low == 0.0
    assert torch.equal(signal.normalize(entropy), torch.zeros_like(entropy))
    assert float(signal.normalize(torch.tensor([9.0, 1e-9]))[0]) == 0.0


def test_tokens_outside_the_scope_are_clamped():
    signal, _ = fit([0.1, 0.2, 0.3, 0.4, 1.0])
    assert signal.normalize(torch.tensor([50.0, 0.0])).tolist() == [1.0, -1.0]


def test_zero_entropy_counts_as_the_floor():
    signal, entropy = fit([0.0, 0.1, 1.0, 2.0], floor=1e-8)
    assert signal.low == pytest.approx(signal.pivot - math.log(1e-8))
    assert float(signal.normalize(entropy)[0, 0]) == -1.0


def test_only_the_scope_counts():
    entropy = torch.tensor([[0.1, 1.0, float("nan")], [2.0, 0.5, 77.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    flat = entropy[mask.bool()]
    assert EntropySignal.fit(entropy, mask) == EntropySignal.fit(flat[None], torch.ones(1, 4))


@pytest.mark.parametrize("bad", [[], [float("nan")], [-0.1], [float("inf")]])
def test_bad_scopes_are_refused(bad):
    with pytest.raises(ValueError, match="entropy signal needs"):
        fit(bad)


def test_temperature_moves_by_tau_at_most_and_needs_a_signal():
    signal, entropy = fit([1e-6, 0.01, 0.1, 0.5, 2.0])
    warm = adaptive_temperature(entropy, signal, base=0.7, tau=0.1)[0]
    assert float(warm[-1]) == pytest.approx(0.7 * 1.1)
    assert float(warm[0]) == pytest.approx(0.7 * 0.9)
    assert torch.equal(adaptive_temperature(entropy, None, base=0.7), torch.full_like(entropy, 0.7))
