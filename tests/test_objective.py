"""The clipped loss token by token, its invariance to how a step is cut, and how it is weighed."""

import math
from dataclasses import fields, replace

import pytest
import torch

from hapo_lite.algo.clipping import clip_bounds
from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, assign_credit, loss_denominator, loss_weights, method_loss, policy_loss
from hapo_lite.algo.tokens import TokenSignals, trained_tokens


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
    assert float(out.loss.detach()) == pytest.approx(loss)
    assert slope == pytest.approx(gradient)
    assert (bool(out.clipped_low), bool(out.clipped_high)) == (clipped == "low", clipped == "high")


def test_masked_positions_may_hold_anything():
    logp = torch.tensor([[-1.0, float("nan"), 500.0]], requires_grad=True)
    full = torch.ones(1, 3)
    mask = torch.tensor([[1, 0, 0]])
    out = policy_loss(logp, torch.tensor([[-1.0, 0.0, -500.0]]), full, mask, 0.8 * full, 1.2 * full, mask.sum())
    out.loss.backward()
    assert float(out.loss.detach()) == -1.0
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
        "reference_logp": old + 0.3 * noise(rows, columns),
        "tokens": TokenSignals(
            h=(h := noise(rows, columns).clamp(-1, 1)),
            entropy=noise(rows, columns).abs(),
            uncertain=h > 0.3,
            scale=noise(rows).exp(),
            factor=1.0 + 0.1 * (noise(rows, columns) > 0),
            drawn=noise(rows, columns) > 0,
        ),
        "mask": torch.arange(columns)[None] < lengths[:, None],
    }


def denominator_of(method, data):
    trained = data["mask"] & trained_tokens(method, data["tokens"].uncertain, drawn=data["tokens"].drawn)
    return loss_denominator(trained.sum(dim=1), method.loss_average, limit=data["mask"].shape[1])


def gradient(method, data, rows, denominator, width=None):
    logp = data["logp"][rows, :width].clone().requires_grad_()
    tokens = data["tokens"]
    own = TokenSignals(
        **{f.name: getattr(tokens, f.name)[rows, :width] for f in fields(tokens) if f.name != "scale"},
        scale=tokens.scale[rows],
    )
    mask = data["mask"][rows, :width]
    trained = trained_tokens(method, own.uncertain, drawn=own.drawn)
    out, _ = method_loss(
        method,
        logp,
        LossInputs(
            data["old_logp"][rows, :width],
            data["advantage"][rows],
            own,
            loss_weights(mask, method.loss_average, trained),
            sampling_logp=data["old_logp"][rows, :width] - 0.01,
            reference_logp=data["reference_logp"][rows, :width],
        ),
        denominator,
    )
    out.loss.backward()
    return logp.grad


ALL_AT_ONCE = Method(
    neutral_zone="adapted",
    importance="truncated",
    loss_average="sequence",
    trained_tokens="uncertain",
    entropy_scale=True,
    entropy_bonus=0.3,
    kl_certain=0.1,
    kl_uncertain=0.2,
)


@pytest.mark.parametrize("surrogate", ["clip", "sequence", "cispo", "sapo"])
def test_the_neutral_zone_is_of_the_adapted_bounds_under_every_surrogate(surrogate):
    """By hand: with h = 0.5 bounds are 0.8 and 1.42, so the zone is 0.9 to 1.21; with h = -0.5 it is 0.85 to 1.14.

    All four ratios lie outside: decisions are amplified, noise stays. That cispo and sapo have no bound on one side, or
    on both, widens no zone.
    """
    method = Method(surrogate=surrogate, neutral_zone="adapted")
    h = torch.tensor([[0.5, 0.5, -0.5, -0.5]])
    tokens = TokenSignals(h=h, uncertain=h > 0, entropy=h, scale=torch.ones(1))
    ratio = torch.tensor([[0.7, 1.4, 0.7, 1.4]])
    found = assign_credit(method, torch.ones(1), tokens, ratio)
    assert found.advantage.tolist() == [[1.5, 1.5, 1.0, 1.0]]


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("chosen", ["uncertain", "random"])
def test_a_token_that_is_not_trained_has_no_gradient(average, chosen):
    """Neither of its advantage nor of its divergence from the base, which the denominator does not count."""
    method = Method(trained_tokens=chosen, loss_average=average, kl_certain=0.1, kl_uncertain=0.2)
    data = batch()
    rows = list(range(6))
    trained = trained_tokens(method, data["tokens"].uncertain, drawn=data["tokens"].drawn) & data["mask"].bool()
    assert bool(trained.any()) and bool((data["mask"].bool() & ~trained).any())
    found = gradient(method, data, rows, 1.0)
    assert not bool(found[~trained].any()) and bool(found[trained].any())


@pytest.mark.parametrize("method", [*PRESETS.values(), ALL_AT_ONCE], ids=[*PRESETS, "all at once"])
def test_gradient_does_not_depend_on_how_the_step_is_cut(method):
    data = batch()
    denominator = denominator_of(method, data)
    whole = gradient(method, data, list(range(6)), denominator)
    assert bool(whole.any())
    for parts in ([[0, 1, 2], [3, 4, 5]], [[5], [3, 1], [0, 4, 2]]):
        for rows in parts:
            width = int(data["mask"][rows].sum(1).max())
            assert torch.equal(gradient(method, data, rows, denominator, width), whole[rows, :width])


PIECES_OFF = dict.fromkeys(("adaptive_temperature", "token_level_advantage", "redistribution", "adaptive_clip"), False)


@pytest.mark.parametrize(
    ("preset", "off", "base"),
    [
        ("hapo", PIECES_OFF, "dapo"),
        ("hapo_public_code", {"low_side": "negative", "neutral_zone": "base"}, "hapo"),
        ("hapo_public_code", {**PIECES_OFF, "low_side": "negative", "neutral_zone": "base"}, "dapo"),
        ("forking_tokens", {"trained_tokens": "all"}, "dapo"),
        ("dapo", {"eps_high": 0.2, "dual_clip": None, "loss_average": "sequence"}, "grpo"),
        ("edge_grpo", {"entropy_scale": False}, "grpo"),
        ("entropy_adv", {"entropy_bonus": 0.0}, "grpo"),
        ("dr_grpo", {"scale": "group", "loss_average": "sequence"}, "grpo"),
        ("gspo", {"surrogate": "clip", "eps_low": 0.2, "eps_high": 0.2}, "grpo"),
        ("cispo", {"surrogate": "clip", "eps_high": 0.28, "dual_clip": 10.0}, "dapo"),
        ("sapo", {"surrogate": "clip"}, "grpo"),
        ("dppo", {"surrogate": "clip", "eps_low": 0.2, "eps_high": 0.28, "dual_clip": 10.0}, "dapo"),
        ("clip_cov", {"covariance_share": 0.0, "eps_low": 0.2, "eps_high": 0.28, "dual_clip": 10.0}, "dapo"),
        ("stare", {"surprisal_factor": 1.0}, "dapo"),
        ("random_tokens", {"trained_tokens": "all"}, "dapo"),
        (
            "archer",
            {"eps_uncertain": None, "kl_certain": 0.0, "uncertain_among": "iteration", "eps_high": 0.28},
            "dapo",
        ),
    ],
)
def test_every_method_with_its_pieces_off_is_the_one_it_is_built_on(preset, off, base):
    data, rows = batch(), list(range(6))
    bare = replace(PRESETS[preset], **off)
    assert replace(bare, preset=base) == PRESETS[base]
    assert torch.equal(gradient(bare, data, rows, 6.0), gradient(PRESETS[base], data, rows, 6.0))


@pytest.mark.parametrize(
    ("preset", "off"),
    [
        ("hapo", {"redistribution": False}),
        ("hapo", {"adaptive_clip": False}),
        ("hapo", {"neutral_zone": "adapted"}),
        ("forking_tokens", {"trained_tokens": "all"}),
        ("archer", {"eps_uncertain": None}),
        ("archer", {"kl_certain": 0.0}),
        ("archer", {"kl_uncertain": 0.001}),
        ("edge_grpo", {"entropy_scale": False}),
        ("entropy_adv", {"entropy_bonus": 0.2}),
        ("entropy_adv", {"entropy_bonus_limit": 4.0}),
        ("dr_grpo", {"loss_average": "sequence"}),
        ("gspo", {"surrogate": "clip"}),
        ("cispo", {"eps_high": 0.28}),
        ("sapo", {"gate_positive": 2.0}),
        ("sapo", {"gate_negative": 2.0}),
        ("dppo", {"eps_low": 0.01}),
        ("dppo", {"eps_high": 0.01}),
        ("dppo", {"dual_clip": 1.1}),
        ("random_tokens", {"trained_tokens": "all"}),
    ],
)
def test_each_piece_changes_the_gradient(preset, off):
    data, rows = batch(), list(range(6))
    method = PRESETS[preset]
    assert not torch.equal(gradient(method, data, rows, 1.0), gradient(replace(method, **off), data, rows, 1.0))


def test_sequence_average_gives_every_completion_the_same_weight():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert loss_weights(mask, "sequence").tolist() == [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]
    trained = torch.tensor([[True, False, False, False], [False] * 4])
    assert loss_weights(mask, "sequence", trained).tolist() == [[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]


def test_denominator_counts_what_is_trained():
    assert loss_denominator(torch.tensor([3, 0, 2]), "token") == 5.0
    assert loss_denominator(torch.tensor([3, 0, 2]), "sequence") == 2.0
    assert loss_denominator(torch.tensor([0, 0]), "token") == loss_denominator(torch.tensor([0]), "sequence") == 1.0


def test_importance_weights_are_truncated():
    # pi_old / mu = e > 2, so every token weighs 2.
    full = torch.zeros(1, 2)
    method = Method(importance="truncated", importance_cap=2.0, redistribution=False)
    ones = torch.ones(1, 2)
    tokens = TokenSignals(full, full, full > 0, torch.ones(1))
    inputs = LossInputs(full, torch.ones(1), tokens, ones)
    out, _ = method_loss(method, full, replace(inputs, sampling_logp=full - 1.0), 2.0)
    assert float(out.loss.detach()) == -2.0
    with pytest.raises(ValueError, match="sampling"):
        method_loss(method, full, inputs, 2.0)
    with pytest.raises(ValueError, match="base model"):
        method_loss(PRESETS["archer"], full, inputs, 2.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": 1.0},
        {"quantile": 1.5},
        {"eps_low": 0.5},
        {"dual_clip": 0.5},
        {"floor": 0.0},
        {"entropy_bonus_limit": 1.0},
        {"entropy_bonus": -0.1},
        {"kl_certain": -0.1},
        {"gate_positive": 0.0},
        {"token_share": 0.0},
        {"token_share": 1.5},
        {"covariance_share": -0.1},
        {"surprisal_factor": 0.0},
        {"surprisal_share": 1.1},
        {"gate_negative": -1.0},
        {"eps_uncertain": 0.4},  # with adaptive_clip, which sets the bounds already
    ],
)
def test_constants_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Method(**bad)
