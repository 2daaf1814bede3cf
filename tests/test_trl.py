"""HAPO in the real GRPOTrainer, on the bundled model, where TRL is installed: pip install -r requirements-bench.txt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, loss_weights, method_loss
from hapo_lite.algo.tokens import TokenSignals, fit_signal
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import load_recipe
from hapo_lite.records import Sequences
from tests.conftest import TINY

pytest.importorskip("trl")

import trl
from datasets import Dataset
from trl.trainer.utils import split_tensor_dict

from hapo_lite.integrations.trl import WITHOUT_A, HapoTrainer

WHOLE = replace(PRESETS["hapo"], adaptive_temperature=False)
METHODS = {
    "hapo": WHOLE,
    "without B": replace(WHOLE, token_level_advantage=False),
    "without C": replace(WHOLE, redistribution=False),
    "without D": replace(WHOLE, adaptive_clip=False),
    "dapo": PRESETS["dapo"],
    "grpo": PRESETS["grpo"],
}


def even(completion_ids, **unused):
    return [float(sum(ids) % 3) for ids in completion_ids]


def make_trainer(folder, **options):
    policy = load_policy(load_recipe(TINY, ["model.quantization=none"]).model, 0, "cpu")
    policy.tokenizer.padding_side = "left"
    prompts = [
        policy.tokenizer.decode(policy.encode([{"role": "user", "content": f"{i} + {i * i}"}])) for i in range(8)
    ]
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    method = options.pop("method", WITHOUT_A)
    return policy, HapoTrainer(
        policy.model,
        reward_funcs=even,
        args=trl.GRPOConfig(str(folder), **settings | options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=policy.tokenizer,
        method=method,
    )


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A trainer whose adapter has left its start, and one generation batch of it."""
    torch.manual_seed(0)
    policy, trainer = make_trainer(tmp_path_factory.mktemp("trl"))
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(0.05 * torch.randn(p.shape))
    trainer.current_gradient_accumulation_steps = 2
    inputs = next(iter(trainer.get_train_dataloader()))
    out = trainer._generate_and_score_completions(inputs)
    return policy, trainer, out, trainer.rewards.sum(dim=1)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_the_kits(sampled, name):
    policy, trainer, out, rewards = sampled
    method = METHODS[name]
    trainer.method = method
    mask = out["completion_mask"].bool()
    batch = sequences(out)
    with torch.no_grad():
        logp, entropy = policy.completion_logprobs(batch, trainer.args.temperature)
    torch.manual_seed(1)
    old = logp + 0.3 * torch.randn(logp.shape)
    signal = fit_signal(method, entropy[mask])
    groups = torch.arange(len(rewards)) // 4
    advantage = group_advantage(rewards.double(), mask.sum(dim=1), groups, method.advantage_level).float()
    inputs = out | {"advantages": advantage, "old_per_token_logps": old}
    if method == WHOLE:
        torch.testing.assert_close(out["advantages"], advantage)
        with torch.no_grad():
            _, own = trainer._score(trainer.model, out, batch_size=4)
        # A difference of large numbers, in fp32: small entropies have few digits, and their logarithm fewer.
        torch.testing.assert_close(own * mask, entropy, rtol=0, atol=2e-5)
        own = own.clamp_min(0.0)
        assert torch.equal(out["h"], fit_signal(method, own[mask]).normalize(own) * mask)
    inputs["h"] = signal.normalize(entropy) * mask

    found = gradient(policy, [trainer.compute_loss(trainer.model, part) for part in split_tensor_dict(inputs, 4)])
    logp, _ = policy.completion_logprobs(batch, trainer.args.temperature)
    h = inputs["h"]
    # Two optimiser steps share the batch, and in each TRL divides by half of its tokens, or by its completions.
    denominator = mask.sum() / 2 if method.loss_average == "token" else 8.0
    loss, _ = method_loss(
        method,
        logp,
        LossInputs(
            old,
            advantage,
            TokenSignals(h, entropy, h > 0, torch.ones(len(h))),
            loss_weights(mask, method.loss_average),
        ),
        denominator,
    )
    expected = gradient(policy, [loss.loss])
    assert float(expected.norm()) > 0.01
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_with_everything_off_it_is_trls_own_loss(sampled, loss_type):
    policy, trainer, out, _ = sampled
    average = {"dapo": "token", "grpo": "sequence"}[loss_type]
    trainer.method = replace(PRESETS["dapo"], dual_clip=None, loss_average=average)
    trainer.loss_type = loss_type
    torch.manual_seed(2)
    inputs = out | {"old_per_token_logps": -3 * torch.rand(out["h"].shape)}
    parts = split_tensor_dict(inputs, 4)
    ours = gradient(policy, [trainer._compute_loss(trainer.model, part) for part in parts])
    theirs = gradient(policy, [trl.GRPOTrainer._compute_loss(trainer, trainer.model, part) for part in parts])
    trainer.loss_type = "dapo"
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_it_trains(tmp_path):
    policy, trainer = make_trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in policy.trainable().items() if "lora_B" in name}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in policy.trainable().items() if name in before)
    assert {"hapo/ratio", "hapo/clipped_high"} <= {key for line in trainer.state.log_history for key in line}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.04}, "beta = 0.04 would not be obeyed"),
        ({"loss_type": "cispo"}, "loss_type = cispo: use dapo"),
        ({"method": PRESETS["hapo"]}, "adaptive_temperature=False"),
        ({"method": PRESETS["archer"]}, "archer: TRL has no place for eps_uncertain"),
        ({"method": replace(WITHOUT_A, truncated="mask")}, "TRL has no place for truncated .* mask_truncated"),
    ],
)
def test_what_would_not_be_obeyed_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)


def sequences(out):
    """The kit's micro-batch, padded on the right, of TRL's, whose prompts are padded on the left."""
    rows, prompt_lengths = [], out["prompt_mask"].sum(dim=1)
    for i, length in enumerate(prompt_lengths):
        rows.append(
            torch.cat([out["prompt_ids"][i, -length:], out["completion_ids"][i, : out["completion_mask"][i].sum()]])
        )
    return Sequences(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        prompt_lengths,
        out["completion_mask"].sum(dim=1),
        out["completion_mask"].bool(),
    )


def gradient(policy, losses):
    policy.model.zero_grad()
    sum(losses).backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])
