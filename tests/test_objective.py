"""The clipped loss token by token, its invariance to how a step is cut, and the methods as settings of one another."""

import math
from dataclasses import replace

import pytest
import torch

from hapo_lite.algo.clipping import clip_bounds
from hapo_lite.algo.objective import PRESETS, Method, loss_weights, method_loss, policy_loss


def one_token(ratio, advantage, lower=0.8, upper=1.28, dual_clip=10.0):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    full = torch.ones(1, 1, dtype=torch.float64)
    out = policy_loss(logp, 0 * full, advantage * full, full, lower * full, upper * full, 1.0, dual_clip)
    out.loss.backward()
    return out, float(logp.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 1.0, -1.1, -1.1, ""),
        (1.5, 1.0, -1.28, 0.0, "high"),  # has risen enough
        (0.5, 1.0, -0.5, -0.5, ""),  # should rise: no bound stops it
        (0.5, -1.0, 0.8, 0.0, "low"),  # has fallen enough
        (1.5, -1.0, 1.5, 1.5, ""),  # should fall
        (12.0, -1.0, 10.0, 0.0, "high"),  # dual clip
    ],
)
def test_loss_of_one_token(ratio, advantage, loss, gradient, clipped):
    out, slope = one_token(ratio, advantage)
    assert float(out.loss) == pytest.approx(loss)
    assert slope == pytest.approx(gradient)
    assert (bool(out.clipped_low), bool(out.clipped_high)) == (clipped == "low", clipped == "high")


def test_masked_positions_may_hold_anything():
    logp = torch.tensor([[-1.0, float("nan"), 500.0]], requires_grad=True)
    full = torch.ones(1, 3)
    mask = torch.tensor([[1, 0, 0]])
    out = policy_loss(logp, torch.tensor([[-1.0, 0.0, -500.0]]), full, mask, 0.8 * full, 1.2 * full, mask.sum())
    out.loss.backward()
    assert float(out.loss) == -1.0
    assert logp.grad.tolist() == [[-1.0, 0.0, 0.0]]
    assert out.metrics == {"ratio": 1.0, "kl_old": 0.0, "clipped_low": 0.0, "clipped_high": 0.0}


def test_bounds_by_hand():
    lower, upper = clip_bounds(torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64))
    assert lower.tolist() == pytest.approx([0.6, 0.7, 0.8, 0.8, 0.8])
    assert upper.tolist() == pytest.approx([1.28, 1.28, 1.28, 1.42, 1.56])


def batch(seed=0, rows=6, columns=7):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -noise(rows, columns).abs()
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    return {
        "logp": old + 0.3 * noise(rows, columns),
        "old_logp": old,
        "advantage": noise(rows),
        "h": noise(rows, columns).clamp(-1, 1),
        "mask": torch.arange(columns)[None] < lengths[:, None],
    }


def gradient(method, data, rows, denominator, width=None):
    logp = data["logp"][rows, :width].clone().requires_grad_()
    weights = loss_weights(data["mask"][rows, :width], method.loss_average)
    out, _ = method_loss(
        method,
        logp,
        data["old_logp"][rows, :width],
        data["advantage"][rows],
        data["h"][rows, :width],
        weights,
        denominator,
        sampling_logp=data["old_logp"][rows, :width] - 0.01,
    )
    out.loss.backward()
    return logp.grad


@pytest.mark.parametrize("method", [*PRESETS.values(), Method(neutral_zone="adapted", importance="truncated")])
def test_gradient_does_not_depend_on_how_the_step_is_cut(method):
    data = batch()
    weights = loss_weights(data["mask"], method.loss_average)
    whole = gradient(method, data, list(range(6)), weights.sum())
    for parts in ([[0, 1, 2], [3, 4, 5]], [[5], [3, 1], [0, 4, 2]]):
        for rows in parts:
            width = int(data["mask"][rows].sum(1).max())
            assert torch.equal(gradient(method, data, rows, weights.sum(), width), whole[rows, :width])


def test_hapo_with_its_pieces_off_is_dapo_and_dapo_with_its_options_off_is_grpo():
    data = batch()
    off = dict.fromkeys(("adaptive_temperature", "token_level_advantage", "redistribution", "adaptive_clip"), False)
    bare = replace(PRESETS["hapo"], **off)
    plain = replace(PRESETS["dapo"], eps_high=0.2, dual_clip=None, loss_average="sequence")
    for left, right in ((bare, PRESETS["dapo"]), (plain, PRESETS["grpo"])):
        rows = list(range(6))
        assert torch.equal(gradient(left, data, rows, 6.0), gradient(right, data, rows, 6.0))
        assert replace(left, preset=right.preset) == right


@pytest.mark.parametrize("piece", ["redistribution", "adaptive_clip"])
def test_each_piece_changes_the_gradient(piece):
    data = batch()
    rows = list(range(6))
    with_piece = gradient(PRESETS["hapo"], data, rows, 1.0)
    assert not torch.equal(with_piece, gradient(replace(PRESETS["hapo"], **{piece: False}), data, rows, 1.0))


def test_sequence_average_gives_every_completion_the_same_weight():
    weights = loss_weights(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), "sequence")
    assert weights.tolist() == [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]


def test_importance_weights_are_truncated():
    # pi_old / mu = e > 2, so every token weighs 2.
    full = torch.zeros(1, 2)
    method = Method(importance="truncated", importance_cap=2.0, redistribution=False)
    ones = torch.ones(1, 2)
    out, _ = method_loss(method, full, full, torch.ones(1), full, ones, 2.0, sampling_logp=full - 1.0)
    assert float(out.loss) == -2.0
    with pytest.raises(ValueError, match="sampling"):
        method_loss(method, full, full, torch.ones(1), full, ones, 2.0)


@pytest.mark.parametrize("bad", [{"tau": 1.0}, {"quantile": 1.5}, {"eps_low": 0.5}, {"dual_clip": 0.5}, {"floor": 0.0}])
def test_constants_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Method(**bad)
