"""Methods that single out tokens before the updates: the equations by hand, and draws that depend on nothing else."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, assign_credit, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.selection import advantage_factor, covariant_tokens, surprising_tokens
from hapo_lite.algo.tokens import TokenSignals
from hapo_lite.records import TokenOutcome
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.skipped import SkippedStep, load_step, save_step
from hapo_lite.train.batching import make_plan
from hapo_lite.train.metrics import update_metrics
from tests.conftest import score
from tests.loops import adapter_digest, run_steps

CLIP_COV, STARE, RANDOM = (PRESETS[name] for name in ("clip_cov", "stare", "random_tokens"))


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_clip_cov_draws_from_the_band_by_hand():
    logp, advantage = numbers(-1, -1.25, -1.5, -3.5, 1, -5.75), numbers(2, 2, 1, 1, 2, -8)
    assert float(logp.mean()) == -2.0 and float(advantage.mean()) == 0.0
    # Covariances (log p + 2) A: 2, 1.5, 0.5, -1.5, 6 and 30. Between 1 and 5 lie the first two.
    uniform = numbers(0.9, 0.4, 0.0, 0.0, 0.0, 0.0)
    assert covariant_tokens(CLIP_COV, logp, advantage, uniform).tolist() == [False, True] + [False] * 4
    # The share is of all six tokens: a half would be three, and only two are there; of 0.2 one is left, as of 2e-4.
    both = covariant_tokens(replace(CLIP_COV, covariance_share=0.5), logp, advantage, uniform)
    assert both.tolist() == [True, True] + [False] * 4
    one = covariant_tokens(replace(CLIP_COV, covariance_share=0.2), logp, advantage, uniform)
    assert one.tolist() == [False, True] + [False] * 4
    wide = replace(CLIP_COV, covariance_share=1.0, covariance_low=0.0, covariance_high=10.0)
    assert covariant_tokens(wide, logp, advantage, uniform).tolist() == [True, True, True, False, True, False]
    factor = advantage_factor(CLIP_COV, logp, advantage, torch.ones(6), uniform)
    assert factor.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_stare_amplifies_the_least_probable_tenth_that_should_rise():
    # Twenty tokens with A > 0, log p = -1 ... -20: a tenth are the last two. The four with A <= 0 are less probable
    # still, and stay.
    logp = -torch.arange(1, 25, dtype=torch.float64)
    advantage = torch.cat([torch.full((20,), 0.5), torch.tensor([0.0, -1.0, -1.0, 0.0])]).double()
    assert surprising_tokens(STARE, logp, advantage).nonzero().flatten().tolist() == [18, 19]
    # 0.1 of 30 is 3, of 31 4, of 3 1; of none it is none. 0.07 of 100 is 7.
    for share, count, expected in ((0.1, 30, 3), (0.1, 31, 4), (0.1, 3, 1), (0.1, 0, 0), (0.07, 100, 7)):
        places = torch.arange(120, dtype=torch.float64)
        found = surprising_tokens(replace(STARE, surprisal_share=share), -places, (places < count).double())
        assert int(found.sum()) == expected
    low, high = torch.full((24,), 0.29), torch.full((24,), 0.3)
    factor = advantage_factor(STARE, logp, advantage, low, logp)
    assert factor.tolist() == [1.0] * 18 + [1.1, 1.1] + [1.0] * 4
    assert advantage_factor(STARE, logp, advantage, high, logp).tolist() == [1.0] * 24


def test_a_factor_and_a_draw_reach_the_credit():
    ones = torch.ones(1, 3, dtype=torch.float64)
    tokens = TokenSignals(0 * ones, ones, ones > 1, torch.ones(1), factor=numbers(1.0, 0.0, 1.1)[None])
    credit = assign_credit(STARE, numbers(-2.0), tokens, ones)
    assert credit.advantage[0].tolist() == pytest.approx([-2.0, 0.0, -2.2])
    drawn = replace(tokens, factor=None, drawn=torch.tensor([[True, False, True]]))
    assert assign_credit(RANDOM, numbers(-2.0), drawn, ones).advantage[0].tolist() == [-2.0, 0.0, -2.0]
    assert assign_credit(STARE, numbers(-2.0), drawn, ones).advantage[0].tolist() == [-2.0] * 3


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
@pytest.mark.parametrize("trained", ["all", "uncertain"])
def test_the_gradient_of_a_share_of_the_tokens_has_the_whole_gradient_as_its_mean(average, trained):
    """Over all 2^6 draws of the six tokens, each with its probability."""
    method = Method(token_share=0.3, loss_average=average, trained_tokens=trained, kl_certain=0.1)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 2])
    mask = torch.arange(4)[None] < lengths[:, None]
    noise = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    h = noise[0].clamp(-1, 1)
    tokens = TokenSignals(h, noise[0].abs(), h > -0.2, torch.ones(2, dtype=torch.float64))
    counted = tokens.uncertain if trained == "uncertain" else torch.ones_like(mask)
    weights = loss_weights(mask, average, counted).double()
    denominator = loss_denominator((mask & counted).sum(dim=1), average, limit=9)

    def gradient(weights):
        logp = (noise[1] * 0.3).requires_grad_()
        inputs = LossInputs(noise[1] * 0, numbers(1.0, -0.5), tokens, weights, reference_logp=noise[2] * 0.1)
        method_loss(method, logp, inputs, denominator)[0].loss.backward()
        return logp.grad

    mean = torch.zeros(2, 4, dtype=torch.float64)
    for draw in itertools.product([False, True], repeat=6):
        kept = torch.zeros_like(mask)
        kept[mask] = torch.tensor(draw)
        probability = 0.3 ** sum(draw) * 0.7 ** (6 - sum(draw))
        mean += probability * gradient(weights * kept / method.token_share)
    whole = gradient(weights)
    assert bool(whole[mask].any())
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-15)


def test_a_completions_ratio_takes_all_its_tokens():
    with pytest.raises(ValueError, match="token_share below 1 does not go with surrogate=sequence"):
        replace(PRESETS["gspo"], token_share=0.5)


DRAWING = "{preset: random_tokens, token_share: 0.6, covariance_share: 0.05, covariance_low: 0.01}"


def selection_of(loop, iteration=2):
    collected = loop.sample(TrainState(iteration=2))
    _, experience = score(loop, collected, iteration)
    return experience


def test_draws_are_those_of_the_completion(make_recipe, make_loop):
    """The same in any order and any batch; others for another seed, iteration and purpose."""
    loop = make_loop(
        make_recipe(f"method={DRAWING}", "rollout.prompts_per_iteration=8", "rollout.old_logprobs=sampled")
    )
    experience = selection_of(loop)
    collected = loop.sample(TrainState(iteration=2))
    reverse = list(range(len(experience)))[::-1]
    graded = collected.graded.select(reverse)
    plan = make_plan([list(range(len(graded)))], graded.sequence_lengths, range(len(graded)), 150)
    backwards = loop.scoring.score(graded, experience.advantage[reverse], plan, loop.selection_key(2)).experience
    other = selection_of(loop, iteration=3)
    for name in ("drawn", "kept", "factor"):
        own, again, elsewhere = (getattr(e, name) for e in (experience, backwards, other))
        assert all(torch.equal(own[i], again[len(own) - 1 - i]) for i in range(len(own))), name
        assert not torch.equal(torch.cat(own), torch.cat(elsewhere)), name
    drawn, kept = torch.cat(experience.drawn).double(), torch.cat(experience.kept).double()
    count = len(drawn)
    # Within five standard deviations of a fifth and of 0.6, and the two draws know nothing of one another.
    assert float(drawn.mean()) == pytest.approx(0.2, abs=5 * (0.16 / count) ** 0.5)
    assert float(kept.mean()) == pytest.approx(0.6, abs=5 * (0.24 / count) ** 0.5)
    assert float((drawn * kept).mean()) == pytest.approx(0.12, abs=5 * (0.12 * 0.88 / count) ** 0.5)
    assert int((torch.cat(experience.factor) == 0.0).sum()) == int(0.05 * count)


def test_an_update_computes_the_kept_tokens_alone(make_recipe, make_loop):
    """The gradient is that of weights 0 and 1 / q on a pass over all tokens, and the head sees fewer of them."""
    loop = make_loop(make_recipe("method={preset: hapo, token_share: 0.3}", "rollout.prompts_per_iteration=8"))
    run_steps(loop, 1)
    collected = loop.sample(TrainState(iteration=2))
    seen = []
    head = loop.policy.token_logprobs
    object.__setattr__(
        loop.policy, "token_logprobs", lambda states, *rest: seen.append(len(states)) or head(states, *rest)
    )
    plan, experience = score(loop, collected, iteration=2)
    # Scoring computes them in the shapes of the updates, and the others after them.
    batches = [batch for part in plan.parts for batch in part]
    kept, lengths = [int(x.sum()) for x in experience.kept], [len(x) for x in experience.kept]
    sizes = [[sum(kept[i] for i in batch), sum(lengths[i] - kept[i] for i in batch)] for batch in batches]
    assert seen == [size for pair in sizes for size in pair]
    batch = experience.select(plan.updates[0][0])
    seen.clear()

    def gradient(batch):
        for p in loop.learner.parameters:
            p.grad = None
        part = loop.update.micro_batch(batch, 100.0)
        part.loss.backward()
        return torch.cat([p.grad.flatten() for p in loop.learner.parameters]), part.outcomes

    found, outcomes = gradient(batch)
    assert seen == [sum(int(kept.sum()) for kept in batch.kept)]
    # By hand: all tokens are computed, and those that were not kept have no advantage.
    whole = replace(loop.recipe.method, token_share=1.0)
    loop.recipe = loop.recipe.model_copy(update={"method": whole})
    by_hand = replace(batch, kept=None, factor=[kept / 0.3 for kept in batch.kept])
    expected, _ = gradient(by_hand)
    assert float((found - expected).norm() / expected.norm()) < 2e-5
    for row, kept in enumerate(batch.kept):
        outcome = outcomes[row]
        assert torch.equal(outcome.computed, kept)
        assert torch.equal(outcome.logp[~kept], batch.old_logp[row][~kept]) and not bool(outcome.credit[~kept].any())
        assert torch.equal(outcome.ratio[~kept], torch.ones(int((~kept).sum())))


def test_a_micro_batch_without_a_kept_token_has_no_gradient(make_recipe, make_loop):
    loop = make_loop(make_recipe("method={preset: dapo, token_share: 0.5}"))
    plan, experience = score(loop, loop.sample(TrainState(iteration=1)), iteration=1)
    batch = experience.select(plan.updates[0][0])
    none = replace(batch, kept=[torch.zeros_like(kept) for kept in batch.kept])
    part = loop.update.micro_batch(none, 1.0)
    part.loss.backward()
    assert float(part.loss.detach()) == 0.0
    assert not any(bool(p.grad.any()) for p in loop.learner.parameters)


@pytest.mark.parametrize("method", [DRAWING, "{preset: stare, surprisal_below: 9.0}"])
def test_selected_tokens_keep_the_loops_properties(make_recipe, make_loop, method):
    """Ratio 1 to the last bit before the first update, and one result for any micro-batch size and on a second run."""
    digests, lines = [], []
    for budget in (150, 100_000, 150):
        loop = make_loop(make_recipe(f"method={method}", f"training.micro_batch_tokens={budget}"))
        _, metrics = run_steps(loop, 2)
        digests.append(adapter_digest(loop))
        lines.append(metrics[0])
    assert digests[0] == digests[2]
    assert lines[1]["update/loss"] == pytest.approx(lines[0]["update/loss"], rel=1e-4, abs=1e-6)
    assert lines[1]["update/grad_norm"] == pytest.approx(lines[0]["update/grad_norm"], rel=1e-4)
    assert lines[0]["ratio/min"] == lines[0]["ratio/max"] == 1.0  # The warm-up starts from a rate of 0.


def test_a_skipped_step_keeps_its_selection(make_recipe, make_loop, tmp_path):
    loop = make_loop(make_recipe(f"method={DRAWING}", "rollout.old_logprobs=sampled"))
    plan, experience = score(loop, loop.sample(TrainState(iteration=1)), iteration=1)
    step = SkippedStep(1, 1, "a test", experience, plan.updates[0]).only(sorted(plan.members[0]))
    path = save_step(tmp_path, step, loop.policy.trainable(), loop.recipe)
    saved = load_step(path).step.experience
    assert saved is not None and saved.reference_logp is None
    for name in ("drawn", "kept", "factor"):
        pairs = zip(getattr(step.experience, name), getattr(saved, name), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs), name


def test_metrics_are_over_the_tokens_that_were_computed():
    ones, half = torch.ones(4), torch.tensor([True, False, False, True])
    ratio, never = torch.tensor([2.0, 1.0, 1.0, 4.0]), torch.zeros(4, dtype=torch.bool)
    outcome = TokenOutcome(
        1.0, ones, ones, ones, never, ones + ratio.log(), ratio, ones, ones, ones, never, half, ~never, computed=half
    )
    metrics = update_metrics([outcome, replace(outcome, advantage=0.0)])
    assert metrics["ratio/kl_old"] == pytest.approx(2.0 - math.log(8.0) / 2.0)
    assert metrics["ratio/mean"] == 3.0 and metrics["clip/high_certain_share"] == 1.0
    assert update_metrics([replace(outcome, computed=never)]) == {}


def test_a_ratio_that_rounds_to_0_is_a_large_divergence_not_an_infinite_one():
    one, never = torch.ones(1), torch.zeros(1, dtype=torch.bool)
    fell = TokenOutcome(1.0, -0.1 * one, one, one, never, -120.0 * one, 0.0 * one, one, one, one, never, never, ~never)
    assert update_metrics([fell])["ratio/kl_old"] == pytest.approx(118.9)


def test_tokens_that_take_no_part_are_counted_and_traced(make_recipe, make_loop):
    loop = make_loop(
        make_recipe(
            "method={preset: random_tokens, token_share: 0.5}",
            "rollout.prompts_per_iteration=8",
            "logging.traces_per_iteration=99",
        )
    )
    _, metrics, traces = loop.step(TrainState())
    # Of the tokens that are computed four fifths are not drawn.
    assert metrics["credit/zero_share"] == pytest.approx(0.8, abs=0.08)
    credits = [credit for trace in traces if any(trace.tokens["advantage"]) for credit in trace.tokens["credit"]]
    assert 0.0 < sum(credit != 0.0 for credit in credits) / len(credits) < 0.3
    json.loads(json.dumps([trace.tokens for trace in traces], allow_nan=False))
