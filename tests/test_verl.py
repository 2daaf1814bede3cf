"""What the verl plug-in registers gives the loss and the gradient of the kit's own loop; with the real verl if it is
there."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.integrations import verl
from hapo_lite.integrations.pieces import refuse_others
from hapo_lite.records import Sequences, pad
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.runs.checkpoint import TrainState
from tests.conftest import score
from tests.verl_batches import LENGTHS, METHODS, in_the_loop, mode_of, random_batch


def configuration(method, **step):
    """verl's actor configuration of a method."""
    return SimpleNamespace(
        clip_ratio=0.1,
        clip_ratio_low=method.eps_low,
        clip_ratio_high=method.eps_high,
        clip_ratio_c=method.dual_clip or math.inf,
        global_batch_info=step,
    )


def plugged_in(method, batch, rows, dp_size, parts):
    """Loss and gradient as verl finds them: micro-batches over dp_size processes, and the mean of their gradients."""
    logp = batch.logp.clone().requires_grad_()
    spread, returns = verl.group_advantages(method, batch.rewards, batch.mask, batch.uids, config=None)
    assert torch.equal(spread, returns)
    config = configuration(
        method, dp_size=dp_size, batch_num_tokens=int(batch.mask[rows].sum()), global_batch_size=len(rows)
    )
    total = 0.0
    for cut in np.array_split(rows, parts):
        with verl.token_signals(batch.h[cut]):
            loss, metrics = verl.clipped_loss(
                method, batch.old_logp[cut], logp[cut], spread[cut], batch.mask[cut], mode_of(method), config
            )
        assert all(math.isfinite(value) for value in metrics.values())
        (loss / dp_size).backward()
        total += float(loss.detach()) / dp_size
    return total, logp.grad


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_the_loops(name):
    method = METHODS[name]
    batch = random_batch(method)
    for rows in (range(len(LENGTHS)), [0, 1, 4, 7, 8, 10]):
        rows = list(rows)
        expected, gradient = in_the_loop(method, batch, rows)
        assert gradient[rows][batch.mask[rows].bool()].abs().max() > 0.01
        for dp_size, parts in ((1, 1), (2, 2), (3, 3)):
            loss, found = plugged_in(method, batch, rows, dp_size, parts)
            assert loss == pytest.approx(expected, rel=1e-12)
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)
            assert float(found[~batch.mask.bool()].abs().sum()) == 0.0


def test_each_piece_reaches_the_loss():
    losses = [
        plugged_in(method, random_batch(method), list(range(len(LENGTHS))), 1, 1)[0] for method in METHODS.values()
    ]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def test_adapter_gradient_is_that_of_the_training_loop(make_recipe, make_loop):
    loop = make_loop(make_recipe("training.updates_per_iteration=1"))
    method = loop.recipe.method
    state, _, _ = loop.step(TrainState(signal=EntropySignal(pivot=-1.5, sigma=3.0, high=2.0, low=6.0)))
    collected = loop.sample(replace(state, iteration=2))
    completions = collected.completions
    plan, scored = score(loop, collected, iteration=2)
    # Another policy than the one that was scored, so that ratios leave 1.
    with torch.no_grad():
        for p in loop.learner.parameters:
            p.add_(0.02 * torch.randn_like(p))
    count = sum(c.length for c in completions)
    loss = loop.update.gradients(scored, plan.updates[0], float(count)).loss
    expected = torch.cat([p.grad.flatten() for p in loop.learner.parameters])
    assert float(expected.norm()) > 0

    loop.learner.optimizer.zero_grad(set_to_none=True)
    rewards = torch.tensor([[s.reward] for s in collected.scores])
    mask = pad([torch.ones(c.length) for c in completions])
    uids = [c.prompt.prompt.id for c in completions]
    spread, _ = verl.group_advantages(method, torch.nn.functional.pad(rewards, (0, mask.shape[1] - 1)), mask, uids)
    config = configuration(method, dp_size=1, batch_num_tokens=count, global_batch_size=len(completions))
    total = 0.0
    for cut in torch.arange(len(completions)).split(5):
        rows = Sequences.of([completions[i] for i in cut])
        width = rows.mask.shape[1]
        logp, _ = loop.policy.completion_logprobs(rows, loop.recipe.rollout.temperature)
        with verl.token_signals(pad([scored.h[i] for i in cut])):
            part, _ = verl.clipped_loss(
                method, pad([scored.old_logp[i] for i in cut]), logp, spread[cut, :width], mask[cut, :width],
                "token-mean", config,
            )  # fmt: skip
        part.backward()
        total += float(part.detach())
    found = torch.cat([p.grad.flatten() for p in loop.learner.parameters])
    assert total == pytest.approx(float(loss), rel=1e-4)
    assert float((found - expected).norm() / expected.norm()) < 2e-5


def test_weights_on_the_sampled_distribution_multiply_the_loss():
    method = PRESETS["dapo"]
    batch, config = random_batch(method), configuration(method)
    spread, _ = verl.group_advantages(method, batch.rewards, batch.mask, batch.uids)
    inputs = method, batch.old_logp, batch.logp, spread, batch.mask, "token-mean", config
    plain, _ = verl.clipped_loss(*inputs)
    halved, _ = verl.clipped_loss(*inputs, torch.where(batch.mask.bool(), 0.5, math.nan))
    assert float(halved) == pytest.approx(0.5 * float(plain), rel=1e-12)


@pytest.mark.parametrize("low_side", ["negative", "positive"])
def test_the_signal_survives_its_journey_to_the_sampler(low_side):
    signal = EntropySignal(-1.5, 3.0, 2.0, 6.0, floor=1e-7, low_side=low_side)
    method = replace(PRESETS["hapo"], tau=0.07, low_side=low_side)
    torch.manual_seed(0)
    logits = torch.randn(64, 50) * torch.logspace(-1, 2, 64)[:, None]
    found = verl.temperature_of(torch.tensor(verl.signal_row(method, signal), dtype=torch.float64).tolist())
    expected = AdaptiveTemperature(signal, tau=0.07)
    assert torch.equal(found(None, logits), expected(None, logits))
    temperature = expected.adapted(logits).temperature
    assert float(temperature.max() - temperature.min()) > 0.06


def test_what_cannot_be_done_is_refused():
    method, config = PRESETS["hapo"], configuration(PRESETS["hapo"])
    zero = torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match="trainer_mode=hapo"):
        verl.clipped_loss(method, zero, zero, zero, torch.ones(1, 2), "token-mean", config)
    with pytest.raises(ValueError, match="token-mean or seq-mean-token-mean"):
        verl.clipped_loss(method, zero, zero, zero, torch.ones(1, 2), "token-sum", config)


@pytest.mark.parametrize(
    ("preset", "piece"),
    [
        ("dr_grpo", "loss_average: constant"),
        ("gspo", "surrogate: sequence"),
        ("cispo", "surrogate: cispo"),
        ("sapo", "surrogate: sapo"),
        ("dppo", "surrogate: dppo"),
        ("clip_cov", "covariance_share"),
        ("stare", "surprisal_factor"),
        ("random_tokens", "trained_tokens"),
    ],
)
def test_a_piece_that_another_trainer_would_not_run_is_refused(preset, piece):
    with pytest.raises(ValueError, match=f"^{preset}: verl has no place for {piece} here; its own are"):
        refuse_others(PRESETS[preset], "verl", "loss_agg_mode")
