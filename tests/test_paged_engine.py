"""Continuous batching: the same completions as the default engine writes, and a model that is as it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch
from transformers.generation.continuous_batching.requests import RequestState

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import load_recipe
from hapo_lite.records import Request, Sequences
from hapo_lite.rollout import paged_engine
from hapo_lite.rollout.canary import check_engine
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.engine import make_engine
from hapo_lite.rollout.paged_engine import PagedEngine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.runs.interrupt import Interrupted, Interrupts
from tests.conftest import TINY, noisy_adapter

SIGNAL = EntropySignal(pivot=-1.5, sigma=3.0, high=2.0, low=6.0)
LIMIT = 20


@pytest.fixture
def loop(make_loop):
    return make_loop(load_recipe(TINY, ["rollout.engine=paged", "data.limit=32", "evaluation.prompts=0"]))


@pytest.fixture
def requests(loop):
    return [Request(prompt, sample) for prompt in loop.stream.take(0, 5) for sample in range(3)]


def sample(engine, requests, processor=None):
    return engine.sample(requests, processor or AdaptiveTemperature(SIGNAL), DrawKey(1, Stage.TRAINING, 2))


def paged(loop, batch_size=6):
    return PagedEngine(loop.policy, batch_size, LIMIT)


def state(policy):
    base = policy.model.get_base_model()
    threads = threading.active_count()
    return policy.model.training, base.config._attn_implementation, "_get_logits_processor" in vars(base), threads


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_it_writes_what_the_default_engine_writes(loop, requests, truncation):
    """With fewer rows than requests, an adapter that does something, stop tokens and completions that are cut off."""
    with noisy_adapter(loop.policy, 0.05, 3):
        processor = AdaptiveTemperature(SIGNAL, 1.1, **truncation)
        theirs = sample(TransformersEngine(loop.policy, 64, LIMIT), requests, processor)
        ours = sample(paged(loop), requests, processor)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.prompt, a.sample, a.text, a.truncated) == (b.prompt, b.sample, b.text, b.truncated)
        assert torch.equal(a.ids, b.ids)
        for name in ("sampling_logp", "base_logp", "entropy", "temperature"):
            assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-4), name
    assert {c.truncated for c in ours} == {True, False}
    assert len({round(float(t), 4) for c in ours for t in c.temperature}) > 20


def test_a_completion_does_not_depend_on_the_batch_or_the_schedule(loop, requests):
    together = sample(paged(loop), requests)
    alone = sample(paged(loop, batch_size=1), requests[::-1][:4])[::-1]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(together[-4:], alone, strict=True))


def test_a_prompt_that_is_read_in_several_steps_leaves_the_others_alone(loop, requests, monkeypatch):
    """The library then computes more rows than there are tokens to draw, and what is noted of those is out of date."""
    expected = sample(paged(loop), requests)
    monkeypatch.setattr(paged_engine, "READ_TOKENS", 5)
    found = sample(paged(loop), requests)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.allclose(a.base_logp, b.base_logp, atol=1e-4)


def test_a_request_that_lost_its_blocks_goes_on_where_it_was(loop, requests, monkeypatch):
    """A cache too small for all rows: some are evicted and start again, with the same random numbers."""
    expected = sample(paged(loop), requests)
    cache, restart, evicted = PagedEngine._cache, RequestState.create_equivalent_initial_request, []

    def small(*arguments):
        found = cache(*arguments)
        found.num_blocks, found.block_size = 9, 8
        return found

    monkeypatch.setattr(PagedEngine, "_cache", small)
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda self: evicted.append(1) or restart(self)
    )
    found = sample(paged(loop), requests)
    assert evicted
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, expected, strict=True))


def test_the_recipe_chooses_it_and_it_follows_the_adapter(loop):
    engine = loop.collector.engine
    assert isinstance(engine, PagedEngine)
    found = check_engine(
        engine, loop.policy, loop.stream.take(0, 2), loop.recipe.rollout, loop.recipe.seed, loop.accelerator
    )
    assert max(found.at_rest.engine, found.perturbed.engine) < 1e-5 < found.followed


def test_the_model_is_as_it_was_after_sampling_and_after_a_failure(loop, requests):
    class Broken(AdaptiveTemperature):
        def adapted(self, logits):
            raise ArithmeticError("out of range")

    before = state(loop.policy)
    assert before[0] and before[1] == "sdpa"
    sample(paged(loop), requests[:2])
    assert state(loop.policy) == before
    with pytest.raises(UserError, match=r"rollout\.engine = paged failed \(out of range\): lower rollout\.batch_size"):
        sample(paged(loop), requests[:2], Broken(None))
    assert state(loop.policy) == before


def test_gradients_after_it_are_those_of_a_model_that_never_sampled(loop, requests):
    """To the last bit, on the 4-bit base: neither its cache nor its attention leaves a trace."""
    batch = Sequences.of(sample(paged(loop), requests[:4]))
    fresh = load_policy(loop.recipe.model, loop.recipe.seed, "cpu")
    found = []
    for policy in (loop.policy, fresh):
        policy.completion_logprobs(batch)[0].sum().backward()
        found.append([p.grad for p in policy.trainable().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(bool(a.any()) for a in found[0])


def test_a_shortage_of_memory_is_told_as_one(loop, requests):
    """So that the run can halve the batch."""
    processor = AdaptiveTemperature(SIGNAL)

    class Short(AdaptiveTemperature):
        def adapted(self, logits):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        sample(paged(loop), requests, Short(SIGNAL))
    assert len(sample(paged(loop), requests, processor)) == len(requests)


def test_a_signal_stops_it_at_once_and_is_not_swallowed(loop, requests):
    class Signalling(AdaptiveTemperature):
        steps = 0

        def adapted(self, logits):
            self.steps += 1
            if self.steps == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().adapted(logits)

    before, processor = state(loop.policy), Signalling(None)
    endless = replace(loop.policy, stop_ids=(len(loop.policy.tokenizer) - 1,))
    with pytest.raises(Interrupted), Interrupts().listening():
        sample(PagedEngine(endless, 64, 400), requests, processor)
    assert 5 <= processor.steps < 200
    assert state(loop.policy) == before


def test_an_engine_that_cannot_be_imported_says_what_to_install(loop, monkeypatch):
    monkeypatch.setitem(sys.modules, "hapo_lite.rollout.paged_engine", None)
    with pytest.raises(UserError, match=r"rollout\.engine = paged cannot be imported .*: pip install 'transformers>="):
        make_engine(loop.recipe, loop.policy)
