"""The Triton kernel against the fold in torch: through Triton's interpreter on a CPU, compiled where there is a GPU."""

import pytest
import torch

from hapo_lite.head import tiles, token_logprobs
from hapo_lite.head.logits import MASKED
from hapo_lite.head.shape import TILES
from hapo_lite.head.softmax import Softmax

head_triton = pytest.importorskip("hapo_lite.head.triton", reason="Triton comes for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_folds_as_torch_does(dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [(3 * torch.randn(5, v, generator=generator)).to(DEVICE, dtype) for v in (64, 50, 1, 64)]
    inputs[0][0], inputs[1][1, 7] = 2.0, 1e4  # ties; a logit that ends all others
    inputs[2][2], inputs[3][3] = MASKED, MASKED
    blank = torch.zeros(5, device=DEVICE, dtype=dtype)
    plain, fused = Softmax.empty(blank), Softmax.empty(blank)
    inside = torch.tensor([True, False, True, True, False], device=DEVICE)
    places = tiles.Places(torch.zeros(5, dtype=torch.long, device=DEVICE), inside)
    for tile in inputs:
        expected = plain.fold(tile.clone(), torch.empty_like(tile))
        for part in (expected.products, expected.exponentials):
            places.put(part, torch.zeros_like(blank))
        found = head_triton.fold(
            fused, tile.clone(), torch.empty_like(tile), torch.where(places.inside, places.column, -1)
        )
        for name in ("products", "exponentials", "rise", "factor"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
        plain, fused = expected.softmax, found.softmax
        for name in ("top", "others", "weighted"):
            torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_the_head_gives_the_same_with_the_kernel(dtype, soft_cap, monkeypatch):
    monkeypatch.setitem(TILES, DEVICE, (4, 64))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 16, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(150, 16, generator=generator).to(DEVICE, dtype)
    targets = torch.randint(150, (9,), generator=generator).to(DEVICE)
    results = []
    for kernel in (None, head_triton.fold):
        monkeypatch.setattr(tiles, "fold_kernel", lambda device, kernel=kernel: kernel)
        states = hidden.clone().requires_grad_()
        logp, entropy = token_logprobs(states, weight, targets, 0.7, soft_cap=soft_cap, entropy_gradient=True)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        results.append((logp.detach(), entropy.detach(), states.grad.float()))
    (*values, gradient), (*fused_values, fused_gradient) = results
    torch.testing.assert_close(fused_values, values, rtol=1e-5, atol=1e-6)
    # A bf16 gradient has 8 bits.
    assert float((fused_gradient - gradient).norm() / gradient.norm()) <= (1e-5 if dtype == torch.float32 else 4e-3)


def test_a_triton_that_cannot_compile_leaves_the_fold_to_torch(monkeypatch):
    """Triton raises at the first launch, as without gcc: a plain RuntimeError or CalledProcessError, no ImportError."""
    head_triton.try_fold(DEVICE)

    def no_compiler(*arguments):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(head_triton, "fold", no_compiler)
    monkeypatch.setattr(head_triton, "try_fold", lambda device: no_compiler())
    tiles.fold_kernel.cache_clear()
    with pytest.warns(UserWarning, match=r"Triton cannot compile here \(Failed to find C compiler.*variable\.\)"):
        assert tiles.fold_kernel("cuda") is None
    assert tiles.fold_kernel("cuda") is None  # said once
    tiles.fold_kernel.cache_clear()


def test_memory_that_runs_out_at_the_first_launch_is_no_fault_of_triton(monkeypatch):
    def short(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(head_triton, "try_fold", short)
    tiles.fold_kernel.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        tiles.fold_kernel("cuda")
    monkeypatch.undo()
    assert tiles.fold_kernel("cpu") is None
    tiles.fold_kernel.cache_clear()
