"""The methods of other papers: each one's equation, worked by hand."""

import json
import math

import pytest
import torch

from hapo_lite.algo.advantage import group_advantage
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.tokens import TokenSignals
from hapo_lite.runs.checkpoint import TrainState
from tests.conftest import score
from tests.loops import digest, run_steps

RIVALS = ("dr_grpo", "gspo", "cispo", "sapo", "dppo", "clip_cov", "stare", "random_tokens")


def plain_signals(*shape: int) -> TokenSignals:
    """Signals that change nothing: h = 0 everywhere."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    return TokenSignals(zeros, zeros, zeros > 0, torch.ones(shape[0], dtype=torch.float64))


def one_step(method, old, ratios, advantage, weights=None, denominator=1.0):
    """Loss, gradient and credit of completions whose tokens have these old probabilities and ratios, [B, T] each."""
    old_logp = torch.tensor(old, dtype=torch.float64).log()
    logp = (old_logp + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    weights = torch.ones_like(old_logp) if weights is None else weights
    inputs = LossInputs(old_logp, torch.tensor(advantage, dtype=torch.float64), plain_signals(*logp.shape), weights)
    out, credit = method_loss(method, logp, inputs, denominator)
    out.loss.backward()
    return out, logp.grad, credit


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


def test_gspo_clips_whole_completions():
    method = PRESETS["gspo"]
    # Ratios 2 and 1/2: s = sqrt(2 * 1/2) = 1, though each token alone is far outside 1 - 3e-4 .. 1 + 4e-4. Ratios 1.21
    # and 1: s = 1.1, above the bound. Ratios 0.81 and 1: s = 0.9, below it.
    ratios = [[2.0, 0.5], [1.21, 1.0], [1.21, 1.0], [0.81, 1.0], [0.81, 1.0]]
    old = [[0.25, 0.5]] * 5
    out, gradient, _ = one_step(method, old, ratios, [1.0, 1.0, -1.0, 1.0, -1.0], torch.full((5, 2), 0.5), 5.0)
    # Each token's slope is -s A / 2 / 5 where the completion is not stopped: A > 0 above, and A < 0 below, it is.
    slopes = [-0.1, 0.0, 0.11, -0.09, 0.0]
    assert gradient.tolist() == [[pytest.approx(slope)] * 2 for slope in slopes]
    # min(s A, clip(s) A): 1, 1.0004, -1.1, 0.9 and -0.9997.
    assert float(out.loss.detach()) == pytest.approx(-(1 + 1.0004 - 1.1 + 0.9 - 0.9997) / 5)
    assert out.clipped_high.tolist() == [[False] * 2, [True] * 2, [False] * 2, [False] * 2, [False] * 2]
    assert out.clipped_low.tolist() == [[False] * 2] * 4 + [[True] * 2]
    assert out.measure.tolist() == [[pytest.approx(s)] * 2 for s in (1.0, 1.1, 1.1, 0.9, 0.9)]
    # The ratios that are reported stay those of the tokens.
    assert out.ratio.tolist() == [pytest.approx(row) for row in ratios]


def test_gspo_has_the_gradient_of_the_papers_sequence_objective():
    """d/d logp of the mean of min(s A, clip(s) A), with s differentiable in every token."""
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 4, 3])
    mask = torch.arange(6)[None] < lengths[:, None]
    logp = (old + 0.01 * torch.randn(4, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    a = torch.tensor([1.0, -0.5, 2.0, -1.0], dtype=torch.float64)
    s = (((logp - old) * mask).sum(1) / lengths).exp()
    (-torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a).mean()).backward()
    expected, logp.grad = logp.grad, None
    inputs = LossInputs(old, a, plain_signals(4, 6), loss_weights(mask, "sequence").double())
    out, _ = method_loss(PRESETS["gspo"], logp, inputs, loss_denominator(lengths, "sequence"))
    out.loss.backward()
    assert bool(expected.any(dim=1).any()) and not bool(expected.any(dim=1).all())
    torch.testing.assert_close(logp.grad, expected, rtol=1e-6, atol=1e-9)


def test_cispo_caps_the_weight_and_stops_no_token():
    method = PRESETS["cispo"]
    ratios = [[0.1, 1.0, 4.0, 6.0], [0.1, 1.0, 4.0, 6.0]]
    out, gradient, credit = one_step(method, [[0.05] * 4] * 2, ratios, [1.0, -1.0], denominator=8.0)
    # -min(r, 5) A d log p over 8 tokens.
    by_hand = [-0.1 / 8, -1 / 8, -4 / 8, -5 / 8]
    assert gradient.tolist() == [pytest.approx(by_hand), pytest.approx([-slope for slope in by_hand])]
    assert out.clipped_high.tolist() == [[False, False, False, True]] * 2
    assert not bool(out.clipped_low.any())
    assert credit.lower.unique().tolist() == [0.0] and credit.upper.unique().tolist() == [5.0]


def test_sapo_fades_with_the_distance_from_one():
    method = PRESETS["sapo"]
    ratios = [[1.0, 1.5, 3.0, 0.2], [1.0, 1.5, 3.0, 0.2]]
    out, gradient, credit = one_step(method, [[0.2] * 4] * 2, ratios, [2.0, -2.0])
    # With q = sigmoid(tau (r - 1)) the slope is -4 q (1 - q) r A. A > 0, tau = 1: q = .5, .6224593, .8807971, .3100255.
    # A < 0, tau = 1.05: q = .5, .6283163, .8909032, .3015348.
    rising = [1.0, 4 * 0.6224593 * 0.3775407 * 1.5, 4 * 0.8807971 * 0.1192029 * 3, 4 * 0.3100255 * 0.6899745 * 0.2]
    falling = [1.0, 4 * 0.6283163 * 0.3716837 * 1.5, 4 * 0.8909032 * 0.1090968 * 3, 4 * 0.3015348 * 0.6984652 * 0.2]
    assert gradient[0].tolist() == pytest.approx([-2 * slope for slope in rising], rel=1e-6)
    assert gradient[1].tolist() == pytest.approx([2 * slope for slope in falling], rel=1e-6)
    # Values 4 / tau q A: the first row's q sum to 2.3132819, the second's to 2.3207543.
    assert float(out.loss.detach()) == pytest.approx(-2 * 4 * 2.3132819 + 2 * 4 / 1.05 * 2.3207543, rel=1e-5)
    assert not bool((out.clipped_low | out.clipped_high).any())
    assert credit.lower.unique().tolist() == [0.0] and credit.upper.unique().tolist() == [math.inf]


def test_dppo_leaves_out_tokens_whose_probability_has_moved_too_far():
    method = PRESETS["dppo"]
    # Probabilities before: .5, .01, .9, .001. After: .7, .1, .7, .03; the changes +.2, +.09, -.2, +.029, delta .15.
    old, ratios = [[0.5, 0.01, 0.9, 0.001]] * 2, [[1.4, 10.0, 7 / 9, 30.0]] * 2
    out, gradient, _ = one_step(method, old, ratios, [1.0, -1.0])
    # A > 0: the first has risen too far; the fourth's ratio 30 weighs 20. A < 0: the third has fallen too far.
    assert gradient[0].tolist() == pytest.approx([0.0, -10.0, -7 / 9, -20.0])
    assert gradient[1].tolist() == pytest.approx([1.4, 10.0, 0.0, 20.0])
    assert out.clipped_high.tolist() == [[True, False, False, False], [False] * 4]
    assert out.clipped_low.tolist() == [[False] * 4, [False, False, True, False]]
    assert out.measure[0].tolist() == pytest.approx([1.2, 1.09, 0.8, 1.029])


@pytest.mark.parametrize("preset", ["gspo", "cispo", "sapo", "dppo"])
def test_a_token_that_does_not_count_may_hold_anything(preset):
    logp = torch.tensor([[-1.0, float("nan"), 500.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -float("inf"), -500.0]])
    zeros = torch.zeros(1, 3)
    tokens = TokenSignals(zeros, zeros, zeros > 0, torch.ones(1))
    inputs = LossInputs(old, torch.ones(1), tokens, torch.tensor([[1.0, 0.0, 0.0]]))
    out, _ = method_loss(PRESETS[preset], logp, inputs, 1.0)
    out.loss.backward()
    assert logp.grad.tolist() == [[-1.0, 0.0, 0.0]]
    assert math.isfinite(float(out.loss.detach()))
    assert out.metrics == {"ratio": 1.0, "kl_old": 0.0, "clipped_low": 0.0, "clipped_high": 0.0}


@pytest.mark.parametrize(("preset", "columns"), [("gspo", {"lower", "upper", "measure"}), ("sapo", set())])
def test_a_trace_has_the_bounds_of_its_method(make_recipe, make_loop, preset, columns):
    settings = ["training.warmup_updates=0", "training.learning_rate=1e-3", "training.updates_per_iteration=4"]
    loop = make_loop(make_recipe(f"method={preset}", *settings))
    _, metrics, traces = loop.step(TrainState())
    tokens = next(trace.tokens for trace in traces if set(trace.tokens["ratio"]) != {1.0})
    assert tokens.keys() & {"lower", "upper", "measure"} == columns
    json.loads(json.dumps(tokens, allow_nan=False))
    if preset == "gspo":
        mean = sum(math.log(r) for r in tokens["ratio"]) / len(tokens["ratio"])
        assert tokens["measure"] == [pytest.approx(math.exp(mean), rel=1e-5)] * len(tokens["ratio"])
        assert metrics["clip/high_certain_share"] + metrics["clip/high_uncertain_share"] > 0.0


@pytest.mark.parametrize("preset", RIVALS)
def test_every_adapter_weight_moves_and_no_base_weight_does(make_recipe, make_loop, preset):
    loop = make_loop(make_recipe(f"method={preset}"))
    frozen = [p for p in loop.policy.model.parameters() if not p.requires_grad]
    before, start = digest(frozen), {name: p.detach().clone() for name, p in loop.policy.trainable().items()}
    run_steps(loop, 2)
    assert digest(frozen) == before
    assert [name for name, p in loop.policy.trainable().items() if torch.equal(p, start[name])] == []
