"""The Triton kernel against the fold in torch: through Triton's interpreter on a CPU, compiled where there is a GPU."""

import pytest
import torch

from hapo_lite import head

head_triton = pytest.importorskip("hapo_lite.head_triton", reason="Triton comes for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_folds_as_torch_does(dtype):
    generator = torch.Generator().manual_seed(0)
    tiles = [(3 * torch.randn(5, v, generator=generator)).to(DEVICE, dtype) for v in (64, 50, 1, 64)]
    tiles[0][0], tiles[1][1, 7] = 2.0, 1e4  # ties; a logit that ends all others
    tiles[2][2], tiles[3][3] = head.MASKED, head.MASKED
    blank = torch.zeros(5, device=DEVICE, dtype=dtype)
    plain, fused = head._Softmax(blank), head._Softmax(blank)
    inside = torch.tensor([True, False, True, True, False], device=DEVICE)
    place = torch.zeros(5, dtype=torch.long, device=DEVICE)
    for tile in tiles:
        products, exponentials = tile.clone(), torch.empty_like(tile)
        rise, factor = plain.fold(products, exponentials)
        for part in (products, exponentials):
            head._put(part, place, inside, torch.zeros_like(blank))
        fused_products, fused_exponentials = tile.clone(), torch.empty_like(tile)
        fused_rise, fused_factor = head_triton.fold(
            fused, fused_products, fused_exponentials, torch.where(inside, place, -1)
        )
        pairs = [(products, fused_products), (exponentials, fused_exponentials), (rise, fused_rise)]
        pairs += [(factor, fused_factor), (plain.top, fused.top), (plain.others, fused.others)]
        for expected, found in [*pairs, (plain.weighted, fused.weighted)]:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_the_head_gives_the_same_with_the_kernel(dtype, soft_cap, monkeypatch):
    monkeypatch.setitem(head.TILES, DEVICE, (4, 64))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 16, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(150, 16, generator=generator).to(DEVICE, dtype)
    targets = torch.randint(150, (9,), generator=generator).to(DEVICE)
    results = []
    for kernel in (None, head_triton.fold):
        monkeypatch.setattr(head, "_fold_kernel", lambda device, kernel=kernel: kernel)
        states = hidden.clone().requires_grad_()
        logp, entropy = head.token_logprobs(states, weight, targets, 0.7, soft_cap=soft_cap, entropy_gradient=True)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        results.append((logp.detach(), entropy.detach(), states.grad.float()))
    (*values, gradient), (*fused_values, fused_gradient) = results
    torch.testing.assert_close(fused_values, values, rtol=1e-5, atol=1e-6)
    # A bf16 gradient has 8 bits.
    assert float((fused_gradient - gradient).norm() / gradient.norm()) <= (1e-5 if dtype == torch.float32 else 4e-3)
