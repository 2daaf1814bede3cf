"""The plug-in inside the real verl, where it is installed: pip install --no-deps verl, and what it asks for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hapo_lite.algo.methods import PRESETS
from tests.verl_batches import LENGTHS, METHODS, in_the_loop, mode_of, random_batch

pytest.importorskip("verl")

from tensordict import TensorDict
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from hapo_lite.integrations import verl, verl_cluster

PROMPT = 3


def actor_config(name, method):
    return FSDPActorConfig(
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        clip_ratio_low=method.eps_low,
        clip_ratio_high=method.eps_high,
        clip_ratio_c=method.dual_clip or math.inf,
        loss_agg_mode=mode_of(method),
        policy_loss={"loss_mode": name},
    )


def nested(rows):
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], layout=torch.jagged)


def verl_batch(batch, h, spread):
    """A micro-batch as verl's engine gives it to a loss: without padding, log-probabilities one place early."""
    zeros = torch.zeros_like(batch.mask)
    logp = batch.logp.clone().requires_grad_()
    moved = [
        torch.cat([torch.zeros(PROMPT - 1).double(), row[:n], torch.zeros(1)])
        for row, n in zip(logp, LENGTHS, strict=True)
    ]
    data = TensorDict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(PROMPT)] * len(LENGTHS), layout=torch.jagged),
            "responses": nested(zeros),
            "response_mask": nested(batch.mask),
            "old_log_probs": nested(batch.old_logp),
            "advantages": nested(spread),
            "hapo_h": nested(h),
        },
        batch_size=len(LENGTHS),
    )
    tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(LENGTHS), global_batch_size=len(LENGTHS))
    return logp, {"log_probs": torch.nested.as_nested_tensor(moved, layout=torch.jagged)}, data


@pytest.mark.parametrize("name", METHODS)
def test_through_verls_own_loss(name):
    method = METHODS[name]
    batch = random_batch(method)
    name = f"{name} of hapo_lite"  # verl has a grpo of its own
    verl.register(name, method)
    spread, _ = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=batch.rewards, response_mask=batch.mask, index=batch.uids, config=None
    )
    logp, output, data = verl_batch(batch, batch.h, spread)
    loss, metrics = verl_cluster.ppo_loss_with_h(actor_config(name, method), output, data)
    loss.backward()
    expected, gradient = in_the_loop(method, batch, list(range(len(LENGTHS))))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-7)
    torch.testing.assert_close(logp.grad, gradient, rtol=1e-7, atol=1e-12)
    assert {"actor/pg_loss", "actor/clipped_high", "actor/kl_old"} <= set(metrics)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_dapo_is_verls_own_clip_higher_loss(average):
    method = replace(PRESETS["dapo"], loss_average=average, dual_clip=3.0)
    batch = random_batch(method)
    spread, _ = verl.group_advantages(method, batch.rewards, batch.mask, batch.uids)
    own, _ = core_algos.get_adv_estimator_fn("grpo")(batch.rewards.clone(), batch.mask, batch.uids)
    torch.testing.assert_close(spread, own, rtol=1e-12, atol=1e-12)
    verl.register(f"dapo, {average} mean", method)
    found = []
    for loss_mode in ("vanilla", f"dapo, {average} mean"):
        config = actor_config(loss_mode, method)
        logp, output, data = verl_batch(batch, batch.h, spread)
        loss, _ = ppo_loss(config, output, data)
        loss.backward()
        found.append((float(loss.detach()), logp.grad))
    (theirs, their_gradient), (ours, our_gradient) = found
    assert ours == pytest.approx(theirs, rel=1e-7)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-10)


def test_h_is_the_iterations_and_rows_that_fill_it_do_not_count():
    method = PRESETS["hapo"]
    batch = random_batch(method)
    kept = batch.entropy[:-1]
    rows = nested(torch.cat([kept, torch.full_like(kept[:1], 9.0)]).float())
    h, signal = verl_cluster.signals(method, rows, nested(batch.mask), [True] * len(kept) + [False])
    mask = batch.mask[:-1].bool()
    expected = verl_cluster.fit_signal(method, kept.float()[mask])
    assert signal == expected
    assert torch.equal(torch.nested.to_padded_tensor(h, 0.0)[:-1][mask], expected.normalize(kept.float())[mask])


def test_names_are_where_verls_configuration_looks():
    assert get_trainer_cls("hapo") is verl_cluster.HapoTrainer
    with pytest.raises(ValueError, match="edge_grpo: verl has no place for entropy_scale"):
        verl.register("edge", PRESETS["edge_grpo"])
