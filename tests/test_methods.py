"""Each method's own piece, worked by hand; and what the training loop does for it."""

import math
from dataclasses import replace

import pytest
import torch

from hapo_lite.algo.advantage import add_entropy_bonus, entropy_scale
from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.objective import LossInputs, assign_credit, loss_denominator, method_loss, policy_loss
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.algo.tokens import TokenSignals, fit_signal, trained_tokens, uncertain_tokens
from hapo_lite.records import TokenOutcome
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.metrics import update_metrics
from tests.conftest import score
from tests.loops import run_steps


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def signals_of(method, *entropies):
    entropy = torch.tensor(entropies, dtype=torch.float64)
    return TokenSignals.of_one(method, fit_signal(method, entropy), entropy)


def test_public_code_takes_the_most_certain_token_for_the_most_uncertain():
    # Quantile 0.8 of six: sorted place round(0.8 * 5) = 4, entropy 1. log H: .6931 0 -.6931 -2.303 -4.605 -9.210.
    # Above 0: / .6931. At or below: d / min(d) = d / -9.210, so 0, .0753, .25, .5 and 1, all positive.
    method = PRESETS["hapo_public_code"]
    tokens = signals_of(method, 2.0, 1.0, 0.5, 0.1, 0.01, 1e-4)
    assert tokens.h[0].tolist() == pytest.approx([1.0, 0.0, 0.0752575, 0.25, 0.5, 1.0], abs=1e-6)
    assert tokens.uncertain[0].tolist() == [True, False, False, False, False, False]
    credit = assign_credit(method, torch.ones(1), tokens, torch.ones(1, 6))
    # The lower bound never moves; the upper one, 1 + 0.28 (1 + h), does for tokens that should have had 1.28.
    assert credit.lower[0].tolist() == pytest.approx([0.8] * 6)
    assert credit.upper[0].tolist() == pytest.approx([1.56, 1.28, 1.3010721, 1.35, 1.42, 1.56])
    # At ratio 1 nothing is suppressed. At 1.2 the adapted zone, 1 + (upper - 1) / 2, still holds h = 0.5 and h = 1
    # (1.21 and 1.28) and has lost 0.0753 and 0.25 (1.1505 and 1.175), which are amplified though they are settled;
    # h = 0 (1.14) is outside too, and 1 + 0 = 1.
    assert credit.advantage[0].tolist() == [1.0] * 6
    moved = assign_credit(method, torch.ones(1), tokens, torch.full((1, 6), 1.2)).advantage[0]
    assert moved.tolist() == pytest.approx([1.0, 1.0, 1.0752575, 1.25, 1.0, 1.0], abs=1e-6)
    # The temperature too rises with certainty.
    signal = fit_signal(method, tokens.entropy[0])
    assert adaptive_temperature(torch.tensor([1e-4]), signal, 1.0, 0.05).item() == pytest.approx(1.05)


def test_forking_tokens_train_the_top_fifth_alone_and_average_over_it():
    method = PRESETS["forking_tokens"]
    # Ten tokens of two completions; sorted place round(0.8 * 9) = 7 holds entropy 8, so 9 and 10 are trained.
    entropy = torch.tensor([[3.0, 10.0, 1.0, 5.0, 2.0], [8.0, 4.0, 9.0, 6.0, 7.0]], dtype=torch.float64)
    signal = fit_signal(method, entropy.flatten())
    uncertain = torch.stack([uncertain_tokens(method, signal, e) for e in entropy])
    assert uncertain.int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    tokens = TokenSignals(signal.normalize(entropy), entropy, uncertain, torch.ones(2))
    logp = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5)
    denominator = loss_denominator(uncertain.sum(dim=1), method.loss_average)
    out, credit = method_loss(
        method, logp, LossInputs(0 * logp.detach(), torch.tensor([1.0, -2.0]), tokens, mask), denominator
    )
    out.loss.backward()
    # Ratio 1: gradient -A / (trained tokens) = -1/2 and 2/2 on the two, 0 elsewhere.
    assert logp.grad.tolist() == [[0.0, -0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]]
    assert credit.advantage.tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -2.0, 0.0, 0.0]]


def test_archer_bounds_by_the_completions_own_quantile():
    method = PRESETS["archer"]
    # Two completions of five: place round(0.8 * 4) = 3 of each. Against the iteration the second would have none.
    sure, unsure = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.4]), torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])
    signal = fit_signal(method, torch.cat([sure, unsure]))
    for entropy in (sure, unsure):
        assert uncertain_tokens(method, signal, entropy).tolist() == [False, False, False, True, False]
    other = replace(method, uncertain_among="iteration")
    assert not uncertain_tokens(other, signal, sure).any()
    credit = assign_credit(method, torch.ones(1), TokenSignals.of_one(method, signal, sure), torch.ones(1, 5))
    assert credit.lower[0].tolist() == pytest.approx([0.8, 0.8, 0.8, 0.5, 0.8])
    assert credit.upper[0].tolist() == pytest.approx([1.2, 1.2, 1.2, 1.5, 1.2])


def test_divergence_from_the_base_by_hand():
    # x = base - logp = ln 2 and -ln 2: exp(x) - x - 1 = 1 - .6931 = .3069 and .5 + .6931 - 1 = .1931. Its slope in logp
    # is 1 - exp(x) = -1 (towards the base) and 1/2. With weights 0.1 and 0.4, A = 0 and two tokens:
    # loss = (0.1 * .3069 + 0.4 * .1931) / 2 = .05397, gradient (-0.1, 0.2) / 2.
    logp = row(-1.0, -1.0).requires_grad_()
    ln2 = math.log(2.0)
    out = policy_loss(
        logp,
        row(-1.0, -1.0),
        row(0.0, 0.0),
        row(1.0, 1.0),
        row(0.8, 0.8),
        row(1.2, 1.2),
        denominator=2.0,
        reference_logp=row(-1.0 + ln2, -1.0 - ln2),
        kl_weight=row(0.1, 0.4),
    )
    out.loss.backward()
    assert out.kl_base[0].tolist() == pytest.approx([1.0 - ln2, ln2 - 0.5])
    assert float(out.loss.detach()) == pytest.approx((0.1 * (1.0 - ln2) + 0.4 * (ln2 - 0.5)) / 2)
    assert logp.grad[0].tolist() == pytest.approx([-0.05, 0.1])


def test_archer_holds_certain_tokens_to_the_base_and_no_others():
    method = PRESETS["archer"]
    tokens = signals_of(method, 0.1, 0.2, 0.3, 0.4, 2.0)
    logp = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    base = torch.full((1, 5), math.log(2.0), dtype=torch.float64)
    ones = torch.ones(1, 5)
    out, _ = method_loss(method, logp, LossInputs(0 * base, torch.zeros(1), tokens, ones, reference_logp=base), 5.0)
    out.loss.backward()
    # Slope of the divergence -1, weight 0.001 on the four certain tokens, mean over five.
    assert logp.grad[0].tolist() == pytest.approx([-0.0002] * 4 + [0.0])


def test_edge_grpo_scales_by_relative_entropy():
    # Mean entropies 0.1, 0.2, 0.6: their mean is 0.3, so the factors are 3, 1.5 and 0.5.
    scale = entropy_scale(torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64))
    assert scale.tolist() == pytest.approx([3.0, 1.5, 0.5])
    method = PRESETS["edge_grpo"]
    tokens = TokenSignals(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.bool), scale)
    credit = assign_credit(method, torch.tensor([1.0, -1.0, -2.0]), tokens, torch.ones(3, 2))
    assert credit.advantage.flatten().tolist() == pytest.approx([3.0, 3.0, -1.5, -1.5, -1.0, -1.0])
    assert bool(torch.isfinite(entropy_scale(torch.tensor([0.0, 0.1]))).all())


def test_entropy_advantage_by_hand():
    # alpha H = 0.4 and 1.2 against |A| / 2 = 0.5, 0.5, 0.25 and 0: the smaller is added, whatever the sign of A.
    out = add_entropy_bonus(row(1.0, 1.0, -0.5, 0.0), row(1.0, 3.0, 3.0, 3.0), alpha=0.4, kappa=2.0)
    assert out[0].tolist() == pytest.approx([1.4, 1.5, -0.25, 0.0])
    method = PRESETS["entropy_adv"]
    assert (method.entropy_bonus, method.entropy_bonus_limit) == (0.4, 2.0)
    credit = assign_credit(method, torch.tensor([-0.5]), signals_of(method, 0.25, 3.0), torch.ones(1, 2))
    assert credit.advantage[0].tolist() == pytest.approx([-0.4, -0.25])


def test_the_base_is_the_same_model_without_its_adapter(make_recipe, make_loop):
    loop = make_loop(make_recipe("method={preset: archer, kl_uncertain: 0.5, kl_certain: 0.5}"))
    parameters = [id(p) for p in loop.policy.trainable().values()]
    state, first, _ = loop.step(TrainState())
    _, second, traces = loop.step(state)
    assert [id(p) for p in loop.policy.trainable().values()] == parameters
    # A fresh adapter adds nothing, to the last bit; both updates see one, since the warm-up starts from a rate of 0.
    assert first["kl_base/certain_mean"] == first["kl_base/uncertain_mean"] == 0.0 < second["kl_base/certain_mean"]
    assert len(traces[0].tokens["kl_base"]) == len(traces[0].tokens["id"])
    assert max(traces[0].tokens["kl_base"]) > 0.0
    collected = loop.sample(replace(state, iteration=3))
    plan, scored = score(loop, collected, iteration=3)
    with torch.no_grad():
        for p in loop.learner.parameters:
            p.zero_()
    zeroed = loop.scoring.score(collected.graded, scored.advantage, plan, loop.selection_key(3)).experience
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(scored.reference_logp, zeroed.old_logp, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(scored.reference_logp, scored.old_logp, strict=True))


def test_with_a_divergence_completions_without_advantage_take_part(make_recipe, make_loop):
    loop = make_loop(make_recipe("method=archer"))
    collected = loop.sample(TrainState(iteration=1))
    plan = loop.plan(collected.graded, loop.active([0.0] * len(collected.completions), []), iteration=1)
    assert not plan.resting
    assert sorted(i for part in plan.updates for b in part for i in b) == list(range(len(collected.completions)))


def test_tokens_left_out_of_the_gradient_are_counted_and_traced(make_recipe, make_loop):
    loop = make_loop(make_recipe("method=forking_tokens"))
    _, metrics, traces = loop.step(TrainState())
    assert metrics["signal/above_share"] == pytest.approx(0.2, abs=0.01)
    assert metrics["credit/zero_share"] > 0.6
    trace = next(t for t in traces if any(t.tokens["advantage"]))
    signal = trace.signal
    for credit, advantage, entropy in zip(
        trace.tokens["credit"], trace.tokens["advantage"], trace.tokens["entropy"], strict=True
    ):
        uncertain = math.log(max(entropy, signal.floor)) > signal.pivot + 1e-6
        assert credit == (advantage if uncertain else 0.0) or abs(math.log(entropy) - signal.pivot) < 1e-5


@pytest.mark.parametrize("left_over", [0.0, 1e-9])
@pytest.mark.parametrize(("preset", "share"), [("hapo", 0.0), ("forking_tokens", 0.75)])
def test_tokens_without_credit_are_those_the_method_leaves_out(preset, share, left_over):
    """A certain token whose credit redistribution has brought to 0, or to a rounding of 0, counts the same."""
    uncertain, ones = torch.tensor([True, False, False, False]), torch.ones(4)
    credit = torch.where(uncertain, 1.0, left_over)
    trained = trained_tokens(PRESETS[preset], uncertain)
    never = ~ones.bool()
    outcome = TokenOutcome(1.0, ones, ones, ones, uncertain, ones, ones, credit, ones, ones, never, never, trained)
    assert update_metrics([outcome])["credit/zero_share"] == share


def test_a_step_is_divided_by_its_own_trained_tokens(make_recipe, make_loop):
    """Those of resting completions included. The warm-up starts from a rate of 0, so every ratio is still 1."""
    loop = make_loop(make_recipe("method=forking_tokens", "rollout.old_logprobs=sampled"))
    collected = loop.sample(TrainState(iteration=1))
    plan, scored = score(loop, collected, iteration=1)
    metrics = loop.update.run(scored, plan, TrainState(iteration=1), loop.observer).metrics
    by_hand = []
    for members in plan.members:
        counts = [int(scored.uncertain[i].sum()) for i in members]
        gain = sum(float(scored.advantage[i]) * n for i, n in zip(members, counts, strict=True))
        by_hand.append(-gain / sum(counts))
    assert metrics["update/loss"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)
    assert abs(metrics["update/loss"]) > 1e-3


def test_the_wrong_sign_reaches_the_sampler_and_survives_a_checkpoint(make_recipe, make_loop):
    loop = make_loop(make_recipe("method=hapo_public_code"))
    state, lines = run_steps(loop, 2)
    assert state.signal.low_side == "positive"
    assert TrainState.from_json(state.to_json()) == state
    assert lines[1]["temperature/min"] >= 1.0
    assert lines[1]["signal/above_share"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("preset", ["edge_grpo", "entropy_adv"])
def test_what_a_token_is_given_is_the_equation_on_the_iterations_entropies(make_recipe, make_loop, preset):
    loop = make_loop(make_recipe(f"method={preset}", "rollout.old_logprobs=sampled"))
    collected = loop.sample(TrainState(iteration=1))
    plan, scored = score(loop, collected, iteration=1)
    outcomes = loop.update.run(scored, plan, TrainState(iteration=1), loop.observer).outcomes
    means = [float(c.entropy.mean()) for c in collected.completions]
    assert len(outcomes) > 4
    for i, outcome in outcomes.items():
        a, entropy = float(scored.advantage[i]), collected.completions[i].entropy
        by_hand = {
            "edge_grpo": [a * sum(means) / len(means) / means[i]] * len(entropy),
            "entropy_adv": [a + min(0.4 * h, abs(a) / 2.0) for h in entropy.tolist()],
        }
        assert outcome.credit.tolist() == pytest.approx(by_hand[preset], rel=1e-5)


def test_signal_with_the_public_sign_mirrors_the_low_side():
    entropy = torch.tensor([[2.0, 1.0, 0.5, 0.01]], dtype=torch.float64)
    right = EntropySignal.fit(entropy, torch.ones_like(entropy))
    wrong = EntropySignal.fit(entropy, torch.ones_like(entropy), low_side="positive")
    assert wrong.normalize(entropy).tolist() == right.normalize(entropy).abs().tolist()
