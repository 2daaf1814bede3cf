"""Fork here: the shares against an enumeration of everything that can follow, and what a fork promises."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError
from hapo_lite.inspect import fork as forks
from hapo_lite.inspect.fork import Branch, Continuation, Fork, ForkSettings, fork, processor_of
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.tasks.verify import grade

STOP = 7
"""In "Take 9*7=63. So \\boxed{70}" the full stop decides: the model guesses after it, and goes on after ","."""


@pytest.fixture(scope="module")
def policy():
    return ModelShelf().get("tiny")


@pytest.fixture(scope="module")
def trace(policy):
    *_, progress = generate(policy, GenerationSettings("9*7+4=?", method=Method(tau=0.3)))
    assert progress.trace.tokens["text"][:9] == ["Take", " 9", "*", "7", "=", "6", "3", ".", " So"]
    return progress.trace


@pytest.fixture(scope="module")
def processor(trace):
    return processor_of(trace, Method(tau=0.3), 1.0)


@pytest.fixture(scope="module")
def whole(policy, trace, processor):
    *_, last = fork(policy, trace, ForkSettings(STOP, "67", alternatives=2, continuations=48), processor)
    return last


@torch.no_grad()
def exact_share(policy, trace, processor, ids: list[int], least: float = 1e-6) -> tuple[float, float]:
    """The probability that a completion that begins with `ids` ends right, and that of what was not followed."""
    model = policy.model
    prompt = policy.encode([{"role": role, "content": text} for role, text in trace.messages])
    right, lost, alive = 0.0, 0.0, [(ids, 1.0)]
    while alive:
        logits = model(torch.tensor([[*prompt, *written] for written, _ in alive])).logits[:, -1]
        following = []
        for (written, mass), row in zip(alive, torch.softmax(processor.adapted(logits).scores, -1), strict=True):
            likely = (row * mass > least).nonzero().flatten().tolist()
            lost += mass * (1.0 - float(row[likely].sum()))
            for token in likely:
                if token in policy.stop_ids:
                    right += mass * float(row[token]) * grade(policy.decode([*written, token]), "67").correct
                else:
                    following.append(([*written, token], mass * float(row[token])))
        alive = following
    return right, lost


def test_shares_value_and_credit_are_those_of_an_enumeration(policy, trace, processor, whole):
    before = trace.tokens["id"][:STOP]
    for branch in whole.branches[:2]:
        exact, lost = exact_share(policy, trace, processor, [*before, branch.token])
        assert lost < 0.01
        reach = 4.0 * math.sqrt(exact * (1.0 - exact) / 48) + 1 / 48 + lost
        assert abs(branch.share.value - exact) < reach
        assert branch.share.low - lost <= exact <= branch.share.high + lost
    value, lost = exact_share(policy, trace, processor, before)
    assert whole.value.low - lost <= value <= whole.value.high + lost
    said, instead = whole.branches[:2]
    assert (said.text, instead.text) == (".", ",")
    assert whole.credit(said).below_zero and whole.credit(instead).above_zero
    assert whole.against_sampled(instead).low > 0.5


def test_the_sampled_token_comes_first_and_seeds_repeat(policy, trace, processor, whole):
    assert whole.sampled.token == trace.tokens["id"][STOP] and whole.before == "Take 9*7=63"
    assert [len(b.continuations) for b in whole.branches] == [48, 48, 48]
    assert whole.sampled.probability == pytest.approx(math.exp(trace.tokens["logp_sampling"][STOP]), rel=1e-4)
    # Fewer branches and fewer continuations: those that are asked for stay the same.
    fewer = ForkSettings(STOP, "67", alternatives=1, continuations=5)
    items = list(fork(policy, trace, fewer, processor))
    assert items[-1].ended == "whole" and not items[0].sampled.continuations
    for branch, other in zip(items[-1].branches, whole.branches, strict=False):
        assert len(branch.continuations) == 5
        assert not Counter(c.text for c in branch.continuations) - Counter(c.text for c in other.continuations)
    *_, other = fork(policy, trace, ForkSettings(STOP, "67", 1, 5, seed=1), processor)
    assert [b.continuations for b in other.branches] != [b.continuations for b in items[-1].branches]


def test_a_token_that_ends_the_completion_has_one_outcome(policy, trace, processor):
    last = len(trace.tokens["id"]) - 1
    *_, found = fork(policy, trace, ForkSettings(last, "70", alternatives=1, continuations=3), processor)
    assert found.sampled.ends and len(found.sampled.continuations) == 1
    assert found.sampled.share.low == found.sampled.share.high == 1.0
    assert found.value.low > 0.99


def test_without_an_answer_nothing_is_graded(policy, trace, processor):
    *_, found = fork(policy, trace, ForkSettings(STOP, alternatives=1, continuations=4), processor)
    assert not found.graded and not found.measured
    answers = [c.answer for c in found.branches[1].continuations]
    assert "67" in answers and all(c.outcome == "" for c in found.branches[1].continuations)


def test_a_cancelled_fork_keeps_whole_batches_alone(policy, trace, processor, monkeypatch):
    """What has ended in a batch that was cut are its shorter continuations: they would bend the shares."""
    monkeypatch.setattr("hapo_lite.rollout.transformers_engine.PREPARING", 0)
    monkeypatch.setattr(forks, "LOOK_SECONDS", 0.0)
    settings = ForkSettings(STOP, "67", alternatives=1, continuations=24)
    seen: list[int] = []

    def cancelled() -> bool:
        return len(seen) > 0 and seen[-1] > forks.ROWS  # in the second batch of 32 and 16

    for found in fork(policy, trace, settings, processor, cancelled):
        seen.append(sum(len(b.continuations) for b in found.branches))
    assert found.ended == forks.CANCELLED and forks.ROWS < max(seen) < 48
    assert seen[-1] == forks.ROWS and [len(b.continuations) for b in found.branches] == [16, 16]
    *_, late = fork(policy, trace, ForkSettings(STOP, "67", 1, 24, seconds=1e-9), processor)
    assert late.ended == forks.OUT_OF_TIME and not late.measured


def test_what_was_not_tried_widens_the_intervals():
    """By hand: tokens of probability 0.5, 0.3 and 0.2, the last without a branch; 8 of 10 and 1 of 10 right."""

    def branch(probability: float, right: int) -> Branch:
        outcomes = ["correct"] * right + ["wrong"] * (10 - right)
        return Branch(0, "", probability, False, False, tuple(Continuation("", o, None, False) for o in outcomes))

    found = Fork(ForkSettings(0), "", (branch(0.5, 8), branch(0.3, 1)), graded=True)
    assert found.untried == pytest.approx(0.2)
    assert found.value.value == pytest.approx((0.5 * 0.8 + 0.3 * 0.1) / 0.8)
    credit = found.credit(found.branches[0])
    assert credit.value == pytest.approx(0.8 - 0.43 / 0.8)
    # 0.8 - 0.43 - 0.2 x (0 to 1), each end further by the reach of 0.5 Q - 0.3 Q': Wilson's ends of 8 and 1 of 10.
    (low, high), (low_of_other, high_of_other) = (0.4901625, 0.9433178), (0.0178762, 0.4041500)
    below = math.hypot(0.5 * (0.8 - low), 0.3 * (high_of_other - 0.1))
    above = math.hypot(0.5 * (high - 0.8), 0.3 * (0.1 - low_of_other))
    assert credit.low == pytest.approx(0.8 - 0.43 - below - 0.2, abs=1e-6)
    assert credit.high == pytest.approx(0.8 - 0.43 + above, abs=1e-6)


def test_what_cannot_be_forked_is_said(policy, trace, processor):
    with pytest.raises(UserError, match="there is no token 99"):
        next(fork(policy, trace, ForkSettings(99), processor))
    for wrong in ({"alternatives": 9}, {"continuations": 0}, {"tokens": 0}, {"seed": -1}, {"seconds": 0.0}):
        with pytest.raises(UserError, match="out of range"):
            ForkSettings(0, **wrong)
    with pytest.raises(UserError, match=r"5 tokens x 64 continuations x 1,024 tokens is 327,680 tokens, more than"):
        ForkSettings(0, continuations=64, tokens=1024)
