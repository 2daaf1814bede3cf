"""The pretended GPU keeps CUDA's rules, counts what costs, and computes what the CPU computes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.decode_cost import requests_of, small_policy
from hapo_lite.records import Sequences
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from tests.pretend_gpu.card import on_card
from tests.pretend_gpu.device import Pretended, Refused, Watch


def of_two_devices(ours, cpu):
    return [
        lambda: ours + cpu,
        lambda: torch.where(ours > 0, ours, cpu),
        lambda: cpu.add_(ours),
        lambda: torch.zeros(()).add_(ours.sum()),
        lambda: cpu[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: ours.index_copy_(0, torch.zeros(1, dtype=torch.long), ours[:1]),
        lambda: torch.cat([ours, cpu]),
    ]


@pytest.mark.parametrize("case", range(7))
def test_tensors_of_two_devices_are_refused(case):
    with Watch():
        work = of_two_devices(torch.ones(3, device="cuda"), torch.ones(3))[case]
        with pytest.raises(Refused, match="two devices"):
            work()


def test_a_scalar_of_the_cpu_is_taken_and_so_are_indices():
    with Watch() as seen:
        ours = torch.arange(3.0, device="cuda")
        assert (ours * torch.tensor(2.0)).inner.tolist() == [0.0, 2.0, 4.0]
        assert not seen.waits
        assert ours[torch.tensor([2, 0])].inner.tolist() == [2.0, 0.0]
        assert seen.waits == {"to the card": 1}


WAITS = {
    "value": [lambda t: t.sum().item(), lambda t: bool((t > 0).all()), lambda t: t.tolist(), lambda t: float(t[0])],
    "size": [lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: t.unique(), lambda t: torch.masked_select(t, t > 0)],
    "to the CPU": [lambda t: t.cpu(), lambda t: torch.empty(3).copy_(t)],
    "to the card": [lambda t: torch.tensor([1, 2], device="cuda"), lambda t: t.copy_(torch.ones(3))],
}


@pytest.mark.parametrize(("kind", "work"), [(kind, work) for kind, works in WAITS.items() for work in works])
def test_a_wait_is_counted_once(kind, work):
    with Watch() as seen:
        ours = torch.ones(3, device="cuda")
        assert not seen.waits
        work(ours)
    assert seen.waits == {kind: 1}


def test_views_launch_nothing_and_what_computes_on_the_card_does_not_wait():
    with Watch() as seen:
        ours = torch.zeros(4, 6, device="cuda")
        before = seen.launched
        ours.T.reshape(3, 2, 4)[1:].transpose(0, 1).unsqueeze(0).expand(5, 2, 2, 4)
        assert seen.launched == before
        ours[torch.arange(2, device="cuda")] = 1.0
        torch.isin(ours, torch.ones(1, device="cuda")).any(dim=0)
        ours.view(-1)[3:5].fill_(2.0)
    assert seen.launched > before and not seen.waits
    assert ours.inner.view(-1).tolist() == [1.0] * 3 + [2.0] * 2 + [1.0] * 7 + [0.0] * 12


@pytest.mark.parametrize(
    ("left", "added", "wanted", "legal"),
    [
        (torch.bfloat16, None, torch.float32, True),
        (torch.float16, None, torch.float32, True),
        (torch.float32, None, torch.float64, False),
        (torch.bfloat16, None, torch.float16, False),
        (torch.bfloat16, torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float64, torch.float32, False),
    ],
)
def test_only_cudas_dtypes_of_a_product_are_taken(left, added, wanted, legal):
    with Watch():
        factor = torch.ones(2, 2, device="cuda", dtype=left)
        total = None if added is None else torch.ones(2, 2, device="cuda", dtype=added)

        def product():
            if total is None:
                return torch.mm(factor, factor, out_dtype=wanted)
            return torch.addmm(total, factor, factor, out_dtype=wanted)

        if legal:
            assert product().dtype == wanted and product().inner.flatten().tolist() == [2.0 + (total is not None)] * 4
        else:
            with pytest.raises((Refused, RuntimeError)):
                product()


def test_products_of_integers_are_refused():
    with Watch():
        ones = torch.ones(2, 2, dtype=torch.long, device="cuda")
        with pytest.raises(Refused, match="no kernel"):
            ones @ ones


def gradients_of(policy, device):
    batch = Sequences(
        torch.arange(24).view(2, 12).to(device),
        torch.tensor([3, 5]).to(device),
        torch.tensor([9, 4]).to(device),
        (torch.arange(9)[None] < torch.tensor([[9], [4]])).to(device),
    )
    logp, _ = policy.completion_logprobs(batch)
    (logp.square().sum() / 7).backward()
    return [p.grad for p in policy.trainable().values()]


def test_the_backward_pass_is_torchs():
    """In fp32, where the two differ by the order of sums alone."""
    expected = gradients_of(small_policy(torch.float32), "cpu")
    with Watch():
        found = gradients_of(on_card(small_policy(torch.float32)), "cuda")
    assert sum(float(gradient.norm()) > 0 for gradient in expected) == len(expected) / 2  # B is 0, so A's are
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, Pretended)
        assert float((ours.inner - theirs).norm()) <= 1e-4 * float(theirs.norm())


def test_a_rollout_writes_what_the_cpu_writes():
    def completions(policy):
        engine = TransformersEngine(policy, batch_size=6, max_new_tokens=20)
        return engine.sample(requests_of(8, 12), AdaptiveTemperature(None), DrawKey(0, Stage.BENCHMARK, 0))

    expected = completions(small_policy(torch.float32))
    with Watch():
        found = completions(on_card(small_policy(torch.float32)))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        torch.testing.assert_close(ours.entropy, theirs.entropy)
