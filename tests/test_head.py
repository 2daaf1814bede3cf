"""The head against naive logits in float64: values, gradients, and the entropies that cancellation destroys."""

import pytest
import torch

from hapo_lite import head
from hapo_lite.head import logits_statistics, token_logprobs


def naive(hidden, weight, targets, temperature):
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def inputs(n=37, d=24, v=301, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(n)
    hidden = scale * torch.randn(n, d, generator=generator)
    return (
        hidden.to(dtype),
        torch.randn(v, d, generator=generator).to(dtype),
        torch.randint(v, (n,), generator=generator),
    )


@pytest.fixture(params=[(512, 4096), (3, 64), (7, 50)])
def tiles(request, monkeypatch):
    """One tile for everything; many, whose width the blocks of the maximum divide; many, where they don't."""
    monkeypatch.setitem(head.TILES, "cpu", request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradient_equal_naive(tiles, temperature):
    hidden, weight, targets = inputs()
    g = torch.linspace(-1, 1, len(targets))
    fast = hidden.clone().requires_grad_()
    logp, entropy = token_logprobs(fast, weight, targets, temperature)
    (logp * g).sum().backward()
    slow = hidden.double().requires_grad_()
    expected, expected_entropy = naive(slow, weight, targets, temperature)
    (expected * g.double()).sum().backward()
    assert float((logp - expected).detach().abs().max()) <= 1e-5
    assert float((entropy / expected_entropy - 1).abs().max()) <= 1e-4
    assert float((fast.grad - slow.grad).norm() / slow.grad.norm()) <= 1e-5
    assert not entropy.requires_grad


def test_gradcheck_with_respect_to_states_and_weight(tiles):
    hidden, weight, targets = inputs(5, 4, 9, torch.float64)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, 0.7)[0], (hidden.requires_grad_(), weight)
    )


def test_states_of_a_frozen_head_need_no_weight_gradient():
    hidden, weight, targets = inputs()
    weight.requires_grad_()
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    expected = weight.detach().double().requires_grad_()
    naive(hidden, expected, targets, 1.0)[0].sum().backward()
    assert float((weight.grad - expected.grad).norm() / expected.grad.norm()) <= 1e-5


@pytest.mark.parametrize("gap", [2, 5, 8, 11, 14, 17, 20, 24, 27, 29])
def test_small_entropies_keep_their_digits(gap):
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(gap))
    logits[0, 77] = logits.max() + gap
    logp = logits.double().log_softmax(-1)
    expected = -(logp.exp() * logp).sum()
    _, entropy = logits_statistics(logits)
    assert float(expected) > 1e-8
    assert float(entropy / expected - 1) == pytest.approx(0.0, abs=1e-4)


def test_edges():
    rows = torch.tensor(
        [
            [3.0, 3.0, 3.0, 3.0],  # ties: log 4
            [1e4, 0.0, 0.0, 0.0],  # one-hot
            [0.0, float("-inf"), 0.0, float("-inf")],  # masked vocabulary: log 2
            [1e4, 1e4, -1e4, 0.0],  # huge: log 2
        ]
    )
    total, entropy = logits_statistics(rows)
    assert entropy.tolist() == pytest.approx([1.3862944, 0.0, 0.6931472, 0.6931472])
    assert total.tolist() == pytest.approx([3 + 1.3862944, 1e4, 0.6931472, 1e4 + 0.6931472])


def test_sizes_and_layouts():
    hidden, weight, targets = inputs()
    logp, entropy = token_logprobs(hidden[:0], weight, targets[:0])
    assert logp.shape == entropy.shape == (0,)
    whole, _ = token_logprobs(hidden, weight, targets)
    strided = hidden.T.contiguous().T
    assert torch.allclose(token_logprobs(strided, weight, targets)[0], whole, atol=1e-6)
    one, _ = token_logprobs(hidden[:1], weight, targets[:1])
    assert torch.allclose(one, whole[:1], atol=1e-6)


def test_bf16_states_give_fp32_results_near_the_truth():
    hidden, weight, targets = inputs(dtype=torch.bfloat16, scale=0.2)
    states = hidden.clone().requires_grad_()
    logp, entropy = token_logprobs(states, weight, targets)
    assert logp.dtype == entropy.dtype == torch.float32
    expected, _ = naive(hidden, weight, targets, 1.0)
    assert float((logp - expected).abs().max()) < 0.02
    logp.sum().backward()
    assert states.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([301] * 37)}, "outside the vocabulary of 301"),
        ({"targets": torch.tensor([-1] * 37)}, "outside the vocabulary"),
        ({"targets": torch.tensor([0])}, "one a token"),
        ({"hidden": torch.zeros(37, 3)}, r"\[N, D\] and \[V, D\]"),
        ({"temperature": 0.0}, "positive"),
    ],
)
def test_bad_calls_are_refused(change, message):
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{"hidden": hidden, "weight": weight, "targets": targets} | change)


def test_temperature_per_token(tiles):
    hidden, weight, targets = inputs()
    temperature = torch.linspace(0.5, 1.5, len(targets))
    together = hidden.clone().requires_grad_()
    logp, entropy = token_logprobs(together, weight, targets, temperature)
    logp.sum().backward()
    for i, value in enumerate(temperature.tolist()):
        alone = hidden[i : i + 1].clone().requires_grad_()
        one, one_entropy = token_logprobs(alone, weight, targets[i : i + 1], value)
        one.sum().backward()
        assert torch.allclose(one, logp[i : i + 1], atol=1e-5)
        assert torch.allclose(one_entropy, entropy[i : i + 1], rtol=1e-4)
        assert torch.allclose(alone.grad[0], together.grad[i], atol=1e-5)


def test_rounding_bf16_products_keeps_the_gradient_within_2e_3():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 256, generator=generator).bfloat16()
    weight = (0.12 * torch.randn(20_000, 256, generator=generator)).bfloat16()
    targets = torch.randint(20_000, (64,), generator=generator)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        states = hidden.to(dtype, copy=True).requires_grad_()
        token_logprobs(states, weight.to(dtype), targets)[0].sum().backward()
        gradients.append(states.grad.float())
    rounded, exact = gradients
    assert float((rounded - exact).norm() / exact.norm()) <= 2e-3


def test_no_gradient_no_second_product(tiles, monkeypatch):
    hidden, weight, targets = inputs()
    expected = token_logprobs(hidden.clone().requires_grad_(), weight, targets)
    monkeypatch.setattr(head._Tiles, "add_product", None)
    with torch.no_grad():
        logp, entropy = token_logprobs(hidden.clone().requires_grad_(), weight, targets)
    assert torch.equal(logp, expected[0]) and torch.equal(entropy, expected[1])


def test_weight_gradient_survives_bf16_products(tiles):
    hidden, weight, targets = inputs(dtype=torch.bfloat16)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        head_weight = weight.to(dtype, copy=True).requires_grad_()
        token_logprobs(hidden.to(dtype), head_weight, targets)[0].sum().backward()
        gradients.append(head_weight.grad.float())
    rounded, exact = gradients
    assert float((rounded - exact).norm() / exact.norm()) <= 3e-3
