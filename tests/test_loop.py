"""The properties of the training loop that peers broke, on the bundled model in 4-bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from hapo_lite.algo.methods import PRESETS
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train.scoring import advantages
from tests.conftest import score
from tests.loops import adapter_digest, digest, run_steps

SIGNAL = EntropySignal(pivot=-1.5, sigma=3.0, high=2.0, low=6.0)


def gradient_of_first_update(loop, collected, budget):
    """The summed gradient of the first optimiser step, before clipping."""
    loop.recipe = loop.recipe.model_copy(
        update={"training": loop.recipe.training.model_copy(update={"micro_batch_tokens": budget})}
    )
    plan, experience = score(loop, collected, iteration=1)
    members, batches = plan.members[0], plan.updates[0]
    trained = torch.stack([t.sum() for t in experience.trained(loop.recipe.method)])
    denominator = loop.update.denominator(trained[members])
    for p in loop.learner.parameters:
        p.grad = None
    for batch in batches:
        loop.update.micro_batch(experience.select(batch), denominator).loss.backward()
    return torch.cat([p.grad.flatten() for p in loop.learner.parameters]), len(batches)


@pytest.mark.parametrize("method", PRESETS)
def test_gradient_does_not_depend_on_micro_batches(make_recipe, make_loop, method):
    loop = make_loop(make_recipe(f"method={method}", "rollout.prompts_per_iteration=8"))
    run_steps(loop, 1)  # so that LoRA's B is not zero and every factor has a gradient
    collected = loop.sample(TrainState(signal=SIGNAL, iteration=2))
    whole, count = gradient_of_first_update(loop, collected, budget=100_000)
    assert count == 1
    for budget in (1, 150):
        cut, count = gradient_of_first_update(loop, collected, budget)
        assert count > 1
        assert float((cut - whole).norm() / whole.norm()) < 2e-5


@pytest.mark.parametrize("method", ["{preset: archer, kl_uncertain: 0.1, truncated: mask}", "{truncated: mask}"])
def test_a_completion_that_was_cut_off_teaches_nothing(make_recipe, make_loop, method):
    """The gradient is that of the others alone, with advantages from the whole group, whatever the micro-batches."""
    loop = make_loop(make_recipe(f"method={method}", "rollout.prompts_per_iteration=8", "rollout.max_new_tokens=24"))
    run_steps(loop, 1)
    collected = loop.sample(TrainState(signal=SIGNAL, iteration=2))
    cut_off = [c.truncated for c in collected.completions]
    assert 4 < sum(cut_off) < len(cut_off) - 4
    masked, kept = loop.recipe.method, replace(loop.recipe.method, truncated="keep")
    advantage, without = advantages(collected.graded, masked), advantages(collected.graded, kept)
    assert any(without[i] != 0.0 for i, cut in enumerate(cut_off) if cut)
    assert [float(a) for a in advantage] == [0.0 if cut else float(a) for a, cut in zip(without, cut_off, strict=True)]

    # By hand: the completions that ended, under the method that keeps all, over their own tokens.
    plan, experience = score(loop, collected, iteration=1)
    rows = [i for i in plan.members[0] if not cut_off[i]]
    assert 0 < len(rows) < len(plan.members[0])
    tokens = float(sum(experience.completions[i].length for i in rows))
    replace(loop.update, method=kept).micro_batch(experience.select(rows), tokens).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in loop.learner.parameters])
    for budget in (100_000, 150):
        found, _ = gradient_of_first_update(loop, collected, budget)
        assert float((found - expected).norm() / expected.norm()) < 2e-5


def test_what_a_mask_leaves_out_is_traced_without_credit(make_recipe, make_loop):
    small = ["rollout.max_new_tokens=24", "logging.traces_per_iteration=9"]
    small += ["training.warmup_updates=0", "training.learning_rate=1e-3"]
    loop = make_loop(make_recipe("method={truncated: mask}", *small))
    _, _, traces = loop.step(TrainState())
    cut_off = [trace for trace in traces if trace.truncated]
    assert cut_off and any(any(trace.tokens["credit"]) for trace in traces if not trace.truncated)
    for trace in cut_off:
        assert not any(trace.tokens["credit"]) and not any(trace.tokens["advantage"])
        change = torch.tensor(trace.tokens["logp_new"]) - torch.tensor(trace.tokens["logp_old"])
        assert torch.allclose(torch.tensor(trace.tokens["ratio"]), change.exp(), atol=1e-4)
    # What the first of the two updates did to a completion of the second is shown.
    assert any(abs(ratio - 1.0) > 1e-3 for trace in cut_off for ratio in trace.tokens["ratio"])


def test_the_divergence_is_a_mean_over_what_is_not_left_out(make_recipe, make_loop):
    """Of a completion that the method leaves out none is recorded, in place of zeros."""
    small = ["rollout.max_new_tokens=24", "logging.traces_per_iteration=32", "training.learning_rate=1e-3"]
    loop = make_loop(make_recipe("method={preset: archer, kl_uncertain: 0.1, truncated: mask}", *small))
    state, _, _ = loop.step(TrainState())
    _, metrics, traces = loop.step(state)
    assert any(trace.truncated for trace in traces) and len(traces) == 16
    assert all(("kl_base" in trace.tokens) != trace.truncated for trace in traces)
    kept = [trace.tokens for trace in traces if not trace.truncated]
    rows = [row for tokens in kept for row in zip(tokens["kl_base"], tokens["upper"], strict=True)]
    certain = [divergence for divergence, upper in rows if upper < 1.3]  # Uncertain ones have a bound of 1.5.
    assert 0 < len(certain) < len(rows)
    assert metrics["kl_base/certain_mean"] == pytest.approx(sum(certain) / len(certain), rel=1e-5)


def test_a_whole_update_does_not_depend_on_micro_batches(make_recipe, make_loop):
    def first_update(budget):
        _, [line] = run_steps(make_loop(make_recipe(f"training.micro_batch_tokens={budget}")), 1)
        return line["update/loss"], line["update/grad_norm"]

    whole = first_update(100_000)
    assert whole[0] != 0.0
    for budget in (1, 150):
        assert first_update(budget) == pytest.approx(whole, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "signal"),
    [*((name, None) for name in PRESETS), *((name, SIGNAL) for name, m in PRESETS.items() if m.adaptive_temperature)],
    ids=lambda value: value if isinstance(value, str) else "adaptive temperature" if value else "base temperature",
)
def test_ratio_is_one_to_the_last_bit_before_the_first_update(make_recipe, make_loop, method, signal):
    loop = make_loop(
        make_recipe(f"method={method}", "training.micro_batch_tokens=150", "logging.traces_per_iteration=0")
    )
    run_steps(loop, 1)
    collected = loop.sample(TrainState(signal=signal, iteration=2))
    plan, experience = score(loop, collected, iteration=2)
    outcomes = loop.update.run(experience, plan, TrainState(iteration=2), loop.observer).outcomes
    first = [outcomes[i] for i in plan.members[0] if i in outcomes]
    later = [outcomes[i] for part in plan.members[1:] for i in part if i in outcomes]
    assert first and later
    assert all(torch.equal(o.ratio, torch.ones_like(o.ratio)) for o in first)
    assert not all(torch.equal(o.ratio, torch.ones_like(o.ratio)) for o in later)


def test_completions_without_advantage_may_rest(make_recipe, make_loop):
    """Leaving them out of the backward changes no gradient, and their tokens still count in the denominator."""
    loop = make_loop(make_recipe("rollout.completions_per_prompt=2", "rollout.prompts_per_iteration=8"))
    run_steps(loop, 1)
    collected = loop.sample(TrainState(iteration=2))
    advantage = advantages(collected.graded, loop.recipe.method)
    resting = (advantage == 0).nonzero().squeeze(1).tolist()
    assert 0 < len(resting) < len(advantage)
    gradients = []
    for traced in ([], resting):  # traced completions always take part
        plan, experience = score(loop, collected, iteration=2, traced=traced)
        for p in loop.learner.parameters:
            p.grad = None
        for batch in plan.updates[0]:
            loop.update.micro_batch(experience.select(batch), 100.0).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loop.learner.parameters]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 2e-5


BARE_HAPO = (
    "method={preset: hapo, adaptive_temperature: false, token_level_advantage: false, redistribution: false, "
    "adaptive_clip: false}"
)
BARE_DAPO = "method={preset: dapo, eps_high: 0.2, dual_clip: null, loss_average: sequence}"


@pytest.mark.parametrize(("left", "right"), [(BARE_HAPO, "method=dapo"), (BARE_DAPO, "method=grpo")])
def test_methods_contain_one_another_to_the_last_bit(make_recipe, make_loop, left, right):
    digests = []
    for method in (left, right):
        loop = make_loop(make_recipe(method))
        run_steps(loop, 2)
        digests.append(adapter_digest(loop))
    assert digests[0] == digests[1]


def test_hapo_differs_from_dapo(make_recipe, make_loop):
    loops = [make_loop(make_recipe(f"method={m}")) for m in ("hapo", "dapo")]
    for loop in loops:
        run_steps(loop, 2)
    assert adapter_digest(loops[0]) != adapter_digest(loops[1])


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_every_adapter_weight_moves_and_no_base_weight_does(make_recipe, make_loop, quantization):
    loop = make_loop(make_recipe(f"model.quantization={quantization}"))
    frozen = [p for p in loop.policy.model.parameters() if not p.requires_grad]
    before = digest(frozen)
    start = {name: p.detach().clone() for name, p in loop.policy.trainable().items()}
    run_steps(loop, 2)
    assert digest(frozen) == before
    for name, p in loop.policy.trainable().items():
        assert not torch.equal(p, start[name]), name


def test_the_next_rollout_uses_the_last_signal(make_recipe, make_loop):
    loop = make_loop(make_recipe())
    _, lines = run_steps(loop, 2)
    assert lines[0]["temperature/min"] == lines[0]["temperature/max"] == 1.0
    # 0.95 and 1.05 are for tokens as certain and as uncertain as any of the first iteration's.
    assert 0.95 - 1e-6 <= lines[1]["temperature/min"] < 0.97
    assert 1.0 < lines[1]["temperature/max"] <= 1.05 + 1e-6


def test_old_logprobs_may_be_the_samplers(make_recipe, make_loop):
    loop = make_loop(make_recipe("rollout.old_logprobs=sampled"))
    _, lines = run_steps(loop, 2)
    assert lines[1]["sampler/gap_max"] == 0.0
    exact = make_loop(make_recipe())
    _, expected = run_steps(exact, 2)
    assert 0.0 < expected[0]["sampler/gap_max"] < 1e-4
    assert lines[1]["update/loss"] == pytest.approx(expected[1]["update/loss"], abs=1e-3)


def test_an_iteration_without_any_signal_is_survived(make_recipe, make_loop):
    """All groups equal: no gradient, but a state that goes on, and metrics that say why."""
    loop = make_loop(make_recipe("rollout.dynamic_sampling=true", "rollout.token_budget=1"))
    loop.collector.scorer = _EqualScorer()
    state, lines = run_steps(loop, 1)
    assert lines[0]["groups/discarded"] == lines[0]["groups/sampled"] == 4
    assert state.iteration == 1 and state.updates == 0 and state.cursor == 4


def test_rewards_that_are_not_finite_skip_the_iteration_under_dynamic_sampling_too(make_recipe, make_loop):
    """And are not discarded as groups with equal rewards until the budget is used up."""
    loop = make_loop(make_recipe("rollout.dynamic_sampling=true"))
    loop.collector.scorer = _EqualScorer(-math.inf)
    _, lines = run_steps(loop, 1)
    assert lines[0]["groups/discarded"] == 0 and lines[0]["update/skipped"] == 2


@dataclass
class _EqualScorer:
    """A task on which every completion is worth the same."""

    reward: float = 0.5

    def score(self, prompts, completions, lengths, truncated, iteration=None):
        from hapo_lite.records import Score

        return [Score(reward=self.reward, correct=False, outcome="wrong", answer=None) for _ in prompts]


def test_dynamic_sampling_fills_the_iteration_and_counts_what_it_dropped(make_recipe, make_loop):
    loop = make_loop(make_recipe("rollout.dynamic_sampling=true", "rollout.completions_per_prompt=2"))
    collected = loop.sample(TrainState(iteration=1))
    groups = [collected.scores[i : i + 2] for i in range(0, len(collected.scores), 2)]
    assert len(groups) == 4
    assert all(len({s.reward for s in group}) > 1 for group in groups)
    assert collected.groups_discarded == collected.groups_sampled - 4 > 0
    assert collected.prompts_used == collected.groups_sampled


def test_dynamic_sampling_stops_at_its_budget(make_recipe, make_loop):
    recipe = make_recipe("rollout.dynamic_sampling=true", "rollout.token_budget=1", "rollout.completions_per_prompt=2")
    collected = make_loop(recipe).sample(TrainState(iteration=1))
    assert collected.groups_sampled == 4


def test_learning_rate_warms_up_and_is_the_one_that_was_used(make_recipe, make_loop):
    loop = make_loop(make_recipe("training.warmup_updates=4", "training.learning_rate=1e-3"))
    _, lines = run_steps(loop, 3)
    # Updates 2, 4 and 6 of a warm-up over 4 from 0: 1/4, 3/4 and all of the peak.
    assert [line["update/learning_rate"] for line in lines] == pytest.approx([0.25e-3, 0.75e-3, 1e-3])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def test_training_raises_the_reward(make_recipe, make_loop, optimizer):
    recipe = make_recipe(
        f"training.optimizer={optimizer}",
        "rollout.prompts_per_iteration=12",
        "rollout.completions_per_prompt=8",
        "training.updates_per_iteration=4",
    )
    _, lines = run_steps(make_loop(recipe), 8)
    assert lines[0]["reward/mean"] < 0.5
    assert lines[-1]["reward/mean"] > lines[0]["reward/mean"] + 0.15


def test_traces_hold_what_the_update_did(make_recipe, make_loop):
    loop = make_loop(make_recipe("logging.traces_per_iteration=3"))
    state = replace(TrainState(), signal=SIGNAL)
    _, _, traces = loop.step(state)
    assert len(traces) == 3
    for trace in traces:
        assert len({len(values) for values in trace.tokens.values()}) == 1
        assert trace.sampling_signal == SIGNAL
        t = {name: torch.tensor(values) for name, values in trace.tokens.items() if name not in ("text", "clipped")}
        assert torch.allclose(t["ratio"], (t["logp_new"] - t["logp_old"]).exp(), atol=1e-4)
        assert torch.allclose(t["h"], trace.signal.normalize(t["entropy"]), atol=1e-4)
        assert "".join(trace.tokens["text"]).startswith(trace.text)
