"""The head against naive logits in float64: values, gradients, and the entropies that cancellation destroys."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hapo_lite.head import logits_statistics, next_token_logits, token_logprobs
from hapo_lite.head.shape import TILES
from hapo_lite.head.tiles import Tiles

ROOT = Path(__file__).parents[1]


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
    monkeypatch.setitem(TILES, "cpu", request.param)


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
    assert float((entropy / expected_entropy.detach() - 1).abs().max()) <= 1e-4
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
    assert float((logp - expected).detach().abs().max()) < 0.02
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
        ({"soft_cap": 0.0}, "soft_cap must be positive"),
        ({"logit_scale": -1.0}, "logit_scale must be positive"),
        ({"bias": torch.zeros(300)}, "one an entry"),
        ({"bias": torch.full((301,), float("-inf")), "soft_cap": 3.0}, "masks nothing"),
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
    monkeypatch.setattr(Tiles, "add_product", None)
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


def naive_options(hidden, weight, targets, temperature, bias, logit_scale, soft_cap):
    z = logit_scale * (hidden.double() @ weight.double().T + bias.double())
    if soft_cap is not None:
        z = soft_cap * torch.tanh(z / soft_cap)
    logp = (z / temperature[:, None]).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_options_and_the_entropy_gradient_equal_naive(tiles, soft_cap):
    hidden, weight, targets = inputs()
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(301, generator=generator)
    temperature = torch.linspace(0.5, 1.5, len(targets))
    on_logp, on_entropy = torch.randn(2, len(targets), generator=generator)
    results = []
    for way, dtype in ((token_logprobs, torch.float32), (naive_options, torch.float64)):
        states = hidden.to(dtype, copy=True).requires_grad_()
        head_weight = weight.to(dtype, copy=True).requires_grad_()
        options = {"bias": bias, "logit_scale": 1.7, "soft_cap": soft_cap}
        if way is token_logprobs:
            options["entropy_gradient"] = True
        logp, entropy = way(states, head_weight, targets, temperature, **options)
        (logp * on_logp + entropy * on_entropy).sum().backward()
        results.append((logp.detach(), entropy.detach(), states.grad, head_weight.grad))
    ours, expected = results
    assert float((ours[0] - expected[0]).abs().max()) <= 1e-5
    assert float((ours[1] / expected[1] - 1).abs().max()) <= 1e-4
    for found, gradient in zip(ours[2:], expected[2:], strict=True):
        assert float((found - gradient).norm() / gradient.norm()) <= 1e-5


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_gradcheck_of_log_probability_and_entropy(tiles, soft_cap):
    hidden, weight, targets = inputs(5, 4, 9, torch.float64)
    options = {"bias": torch.linspace(-1, 1, 9), "logit_scale": 0.8, "soft_cap": soft_cap, "entropy_gradient": True}
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, 0.7, **options),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


def test_a_masked_vocabulary_is_the_smaller_vocabulary(tiles):
    hidden, weight, targets = inputs()
    allowed = torch.arange(301) % 3 == 1
    allowed[:120] = False  # whole tiles are masked before the first entry that counts
    targets = allowed.nonzero().squeeze(1)[targets % int(allowed.sum())]
    bias = torch.zeros(301).masked_fill(~allowed, float("-inf"))
    renumbered = allowed.cumsum(0)[targets] - 1
    results = []
    for matrix, ids, options in ((weight, targets, {"bias": bias}), (weight[allowed], renumbered, {})):
        states = hidden.clone().requires_grad_()
        logp, entropy = token_logprobs(states, matrix, ids, **options)
        logp.sum().backward()
        results.append((logp.detach(), entropy, states.grad))
    for masked, small in zip(*results, strict=True):
        torch.testing.assert_close(masked, small, rtol=1e-5, atol=1e-5)


def test_huge_and_equal_logits(tiles):
    weight = torch.zeros(301, 2)
    weight[:, 0] = -1.0
    weight[[5, 200], 0] = 1.0  # two equal tops, in different tiles
    hidden = torch.tensor([[1e4, 0.0], [0.0, 1.0]], requires_grad=True)
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([200, 0]))
    logp.sum().backward()
    two, all_equal = torch.tensor(2.0).log(), torch.tensor(301.0).log()
    torch.testing.assert_close(logp.detach(), torch.stack([-two, -all_equal]), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.stack([two, all_equal]), rtol=1e-6, atol=0)
    expected = torch.tensor([[0.0, 0.0], [-1.0 - (2 - 299) / 301, 0.0]])
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [2, 8, 14, 20, 24, 27])
def test_small_entropies_and_their_gradient_keep_their_digits(gap, tiles):
    """From nearly certain tokens: entropy relative to float64, and the gradient of a target that is all but sure."""
    generator = torch.Generator().manual_seed(gap)
    weight = torch.randn(3001, 8, generator=generator)
    hidden = torch.zeros(1, 8)
    hidden[0, 0], weight[77, 0] = 1.0, weight[:, 0].max() + gap
    targets = torch.tensor([77])
    states = hidden.clone().requires_grad_()
    logp, entropy = token_logprobs(states, weight, targets)
    logp.sum().backward()
    _, expected_entropy = naive(hidden, weight, targets, 1.0)
    assert float(entropy / expected_entropy - 1) == pytest.approx(0.0, abs=1e-4)
    # As a sum of small terms. Autograd's w(y) less the mean of w would lose digits of its own, how many depends on the
    # CPU: at a gap of 27, 1 - p(y) is 2e-10.
    p = (hidden.double() @ weight.double().T).softmax(-1)
    expected = p @ (weight[77] - weight).double()
    assert float((states.grad - expected).norm() / expected.norm()) <= 1e-5


def test_expanded_targets_and_states(tiles):
    hidden, weight, targets = inputs()
    repeated = token_logprobs(hidden[:1].expand(9, -1), weight, targets[:1].expand(9))[0]
    once = token_logprobs(hidden[:1], weight, targets[:1])[0]
    torch.testing.assert_close(repeated, once.expand(9), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_weight_counts_as_what_it_unpacks_to(tiles, nested):
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit

    hidden, weight, targets = inputs(d=64)
    packed = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested).to("cpu")
    unpacked = functional.dequantize_4bit(packed.data, packed.quant_state)
    results = []
    for matrix in (packed, unpacked):
        states = hidden.clone().requires_grad_()
        logp, entropy = token_logprobs(states, matrix, targets)
        logp.sum().backward()
        results.append((logp.detach(), entropy, states.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_fp16_weight_is_cast_as_it_is_read(tiles):
    hidden, weight, targets = inputs()
    half = weight.half()
    found, expected = token_logprobs(hidden, half, targets), token_logprobs(hidden, half.float(), targets)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# A product in bfloat16 takes a CPU without instructions for it many times as long.
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_peak_memory_is_the_jacobian_and_64_mb_whatever_the_vocabulary(dtype):
    """As the benchmark measures it: a fresh process, beyond the inputs and the gradient returned."""
    found = []
    for vocabulary in (32_768, 131_072):
        command = [sys.executable, str(ROOT / "benchmarks" / "head.py"), "--way", "ours", "--dtype", dtype]
        command += ["--tokens", "1024", "--hidden", "128", "--vocabulary", str(vocabulary)]
        found.append(float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) * 2**20)
    assert max(found) <= 1024 * 128 * 4 + 64e6  # the N x V logits alone would be 537e6
    assert abs(found[1] - found[0]) <= 8e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [301, 9_001])
def test_a_samplers_logits_are_the_exact_product(dtype, vocabulary):
    """Also in bf16, where they are as large as a real model's: a plain product is off by 0.06 there."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, 64, generator=generator, dtype=torch.float64)
    hidden, weight = (4.0 * hidden / hidden.norm(dim=1, keepdim=True)).to(dtype), (weight * 2.0).to(dtype)
    bias = 0.1 * torch.randn(vocabulary, generator=generator)
    exact = hidden.double() @ weight.double().T + bias.double()
    logits = next_token_logits(hidden, weight, bias)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    likely = exact > exact.amax(dim=1, keepdim=True) - 1.0
    error = (logits.double() - exact).abs()
    if dtype == torch.bfloat16:
        plain = ((hidden @ weight.T).double() + bias.double() - exact).abs()
        assert error[likely].mean() < plain[likely].mean() / 5 and error[likely].max() < 0.02
    else:
        assert error.max() < {torch.float32: 5e-5, torch.float64: 1e-12}[dtype]


def test_a_samplers_logits_from_a_4_bit_weight_are_those_of_the_unpacked_one():
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit

    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(300, 128, generator=generator)
    packed = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    unpacked = functional.dequantize_4bit(packed.data, packed.quant_state)
    hidden = torch.randn(5, 128, generator=generator)
    assert torch.allclose(next_token_logits(hidden, packed), hidden @ unpacked.T, atol=1e-5)
