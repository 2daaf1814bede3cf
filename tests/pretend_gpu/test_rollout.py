"""Every engine that runs on the policy's own model, and the check before training, on a pretended GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from benchmarks.decode_cost import requests_of, small_policy
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout import canary, transformers_engine
from hapo_lite.rollout.canary import TOKENS
from hapo_lite.rollout.decoding import LOOK_EVERY
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.generate_engine import GenerateEngine
from hapo_lite.rollout.inversion import LARGE
from hapo_lite.rollout.paged_engine import PagedEngine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.tiny.task import problems
from tests.pretend_gpu.card import on_card
from tests.pretend_gpu.conftest import KINDS, policy_of
from tests.pretend_gpu.device import Watch

A_BATCH = 11
"""Waits of the default engine for a batch of rows. Seven are `generate`'s: it copies two tokens to the card, and asks
for five values before the first token. Four are for the completions: lengths, who has stopped, ids, records."""
GENERATE = (11, 2)
"""Waits of `generate` for a batch and for a step. At each step it asks whether all rows have ended, and its mask asks
whether all tokens are visible. The cache of transformers asks the latter in our decoding loop too."""
PAGED = (4, 10)
"""Waits of continuous batching for a part and for a step. The library copies eight lists to the card at each step, and
reads the tokens after it has synchronised."""
A_PASS, A_STEPWISE_PASS, DIRECTIONS = 5, 4 + TOKENS, 6
"""Waits of the check before training. A trainer's pass: those of a micro-batch, and the choice of the real tokens. A
pass token by token: its mask at each step, targets, and two copies to the CPU. The directions: a pass whose result
stays on the card, the gradient of its choice of tokens, and a norm; and one wait for each block."""
VERDICT = 2
"""Waits for what all processes have found."""

WAYS = {
    "A, base 0.9": AdaptiveTemperature(EntropySignal(pivot=-1.5, sigma=3.0, high=2.0, low=6.0), base=0.9),
    "without A": AdaptiveTemperature(None),
    "A, top_p, top_k": AdaptiveTemperature(EntropySignal(-1.5, 3.0, 2.0, 6.0), top_p=0.9, top_k=40),
}
"""Processors, by the row of the table: with and without the adaptive temperature, and truncated."""
KEY = DrawKey(0, Stage.BENCHMARK, 0)


def requests_for(policy, samples=4):
    texts = [p.prompt for p in problems("train")[:3]] + ["1", "What is the value of 12+3*4=? Think well."]
    prompts = [
        EncodedPrompt(i, Prompt(str(i), (("user", t),), "0"), tuple(policy.encode([{"role": "user", "content": t}])))
        for i, t in enumerate(texts)
    ]
    return [Request(prompt, sample) for prompt in prompts for sample in range(samples)]


def longest(completions):
    return max(c.length for c in completions)


def looks(completions):
    return math.ceil(longest(completions) / LOOK_EVERY)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_engine_waits_for_one_step_in_eight(kind, way, stage):
    policy = policy_of(kind)
    with stage(f"rollout: {way}", kind) as seen:
        completions = TransformersEngine(policy, 64, 32).sample(requests_for(policy), WAYS[way], KEY)
        seen.budget = A_BATCH + looks(completions)
    assert len({c.length for c in completions}) > 3  # so rows were given up on the way


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_vocabulary_that_is_inverted_by_blocks(kind, stage):
    """Qwen2's shape with a head that is its embedding: the draw of large vocabularies has operators of its own."""
    policy = on_card(small_policy({"bf16": torch.bfloat16, "fp16": torch.float16}[kind]))
    with stage("rollout: large vocabulary", kind) as seen:
        completions = TransformersEngine(policy, 8, 16).sample(requests_of(8, 12), WAYS["A, base 0.9"], KEY)
        seen.budget = A_BATCH + looks(completions)
    assert policy.base.config.vocab_size > LARGE and policy.base.config.tie_word_embeddings


class Recorder:
    """Stands for the recording of CUDA graphs: a step that is replayed must not wait, and keeps its shapes."""

    def __init__(self, seen: Watch) -> None:
        self.seen, self.replayed = seen, 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            before = self.seen.waited
            step()
            assert self.seen.waited == before, f"a recorded step waits:\n{self.seen.report()}"
            self.replayed += 1

        return replay


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_can_be_recorded(kind, stage):
    policy = policy_of(kind)
    with stage("rollout: steps as for CUDA graphs", kind) as seen:
        recorder = Recorder(seen)
        with mock.patch.object(transformers_engine, "recorder_for", lambda setting, device: recorder):
            completions = TransformersEngine(policy, 64, 32, "auto").sample(
                requests_for(policy), WAYS["A, base 0.9"], KEY
            )
        seen.budget = A_BATCH + looks(completions)
    assert recorder.replayed > longest(completions) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_of_other_models_waits_at_each_step(kind, stage):
    policy = policy_of(kind)
    engine = TransformersEngine(policy, 64, 32)
    engine.fixed = False
    with stage("rollout: cache of transformers", kind) as seen:
        completions = engine.sample(requests_for(policy), WAYS["A, base 0.9"], KEY)
        # The loop writes on until it looks.
        seen.budget = A_BATCH + looks(completions) * (1 + LOOK_EVERY)


@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, stage):
    policy = policy_of(kind)
    with stage("rollout: generate", kind) as seen:
        completions = GenerateEngine(policy, 64, 32).sample(requests_for(policy), WAYS["A, base 0.9"], KEY)
        seen.budget = GENERATE[0] + GENERATE[1] * longest(completions)


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_batching(kind, stage):
    policy = policy_of(kind)
    with stage("rollout: paged", kind) as seen:
        # The library decodes in a thread of its own.
        loop = seen.in_thread(ContinuousBatchingManager._run_generation_loop)
        with mock.patch.object(ContinuousBatchingManager, "_run_generation_loop", loop):
            completions = PagedEngine(policy, 64, 24).sample(requests_for(policy, 1), WAYS["A, base 0.9"], KEY)
        seen.budget = PAGED[0] + PAGED[1] * longest(completions)


@pytest.mark.parametrize("kind", KINDS)
def test_the_check_before_training(kind, stage, make_loop):
    with Watch():
        loop = make_loop(kind)
    prompts, engine = loop.stream.take(0, 8), loop.collector.engine
    blocks = loop.policy.base.config.num_hidden_layers
    with (
        stage("check before training", kind) as seen,
        mock.patch.object(canary, "trainer_logp", wraps=canary.trainer_logp) as passes,
    ):
        found = canary.check_engine(engine, loop.policy, prompts, loop.recipe.rollout, 0, loop.accelerator)
        sampled = 2 * (A_BATCH + TOKENS // LOOK_EVERY)
        seen.budget = sampled + A_PASS * passes.call_count + 2 * A_STEPWISE_PASS + DIRECTIONS + blocks + VERDICT
    assert found.right and found.moved > 0.1
