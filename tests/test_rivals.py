"""The methods of other papers: each one's equation, worked by hand."""

import pytest
import torch

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.tokens import TokenSignals
from hapo_lite.runs.checkpoint import TrainState
from tests.conftest import score


def plain_signals(*shape: int) -> TokenSignals:
    """Signals that change nothing: h = 0 everywhere."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    return TokenSignals(zeros, zeros, zeros > 0, torch.ones(shape[0], dtype=torch.float64))


def test_dr_grpo_divides_by_completions_times_the_limit_and_by_no_deviation():
    method = PRESETS["dr_grpo"]
    # Rewards 1, 0, 0: A = 2/3, -1/3, -1/3. Lengths 1, 3, 2; at most 5 tokens each: 3 x 5. At ratio 1 the gradient of a
    # token is -A / 15, and the loss is -(1 * 2/3 - 3 * 1/3 - 2 * 1/3) / 15 = 1/15.
    lengths = torch.tensor([1, 3, 2])
    rewards = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    advantage = group_advantage(rewards, lengths, torch.zeros(3), method.advantage_level, method.scale)
    mask = torch.arange(3)[None] < lengths[:, None]
    logp = torch.full((3, 3), -1.0, dtype=torch.float64, requires_grad=True)
    denominator = loss_denominator(lengths, method.loss_average, limit=5)
    inputs = LossInputs(logp.detach(), advantage, plain_signals(3, 3), loss_weights(mask, method.loss_average))
    out, _ = method_loss(method, logp, inputs, denominator)
    out.loss.backward()
    assert denominator == 15.0
    assert float(out.loss.detach()) == pytest.approx(1 / 15)
    third = 1 / 45
    expected = [[-2 * third, 0, 0], [third, third, third], [third, third, 0]]
    assert [pytest.approx(row) for row in expected] == logp.grad.tolist()
    with pytest.raises(ValueError, match="limit on the tokens"):
        loss_denominator(lengths, method.loss_average)


def test_dr_grpo_counts_every_completion_of_the_step(make_recipe, make_loop):
    """Completions without an advantage rest, and are in the denominator all the same."""
    loop = make_loop(make_recipe("method=dr_grpo", "rollout.old_logprobs=sampled"))
    collected = loop.sample(TrainState(iteration=1))
    plan, scored = score(loop, collected, iteration=1)
    assert any(a == 0.0 for a in scored.advantage.tolist())
    metrics = loop.update.run(scored, plan, TrainState(iteration=1), loop.observer).metrics
    limit = loop.recipe.rollout.max_new_tokens
    by_hand = [
        -sum(float(scored.advantage[i]) * scored.completions[i].length for i in members) / (len(members) * limit)
        for members in plan.members
    ]
    # The warm-up starts from a rate of 0, so every ratio is 1.
    assert metrics["update/loss"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)
    assert abs(metrics["update/loss"]) > 1e-4
