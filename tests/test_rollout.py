"""Sampling: the right distribution, independent of the batch, with records that are true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.records import EncodedPrompt, Prompt, Request, Sequences
from hapo_lite.rollout.draws import DrawKey, Stage, draws_of, uniforms
from hapo_lite.rollout.generate_engine import GenerateEngine
from hapo_lite.rollout.inversion import draw_token
from hapo_lite.rollout.sampling import AdaptiveTemperature, draw
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.tiny.task import problems

SIGNAL = EntropySignal(pivot=-1.5, sigma=3.0, high=2.0, low=6.0)


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelSettings(name="tiny", lora=LoraSettings(rank=4, alpha=8.0)), 0, "cpu")


@pytest.fixture(scope="module")
def prompts(policy):
    texts = [p.prompt for p in problems("train")[:5]] + ["1", "What is the value of 12+3*4=? Think well."]
    return [
        EncodedPrompt(i, Prompt(str(i), (("user", t),), "0"), tuple(policy.encode([{"role": "user", "content": t}])))
        for i, t in enumerate(texts)
    ]


def sample(policy, requests, batch_size=64, signal=SIGNAL, base=1.0, limit=24, seed=0, iteration=1, **truncation):
    engine = TransformersEngine(policy, batch_size, limit)
    key = DrawKey(seed, Stage.TRAINING, iteration)
    return engine.sample(requests, AdaptiveTemperature(signal, base, **truncation), key)


@pytest.fixture(scope="module")
def requests(prompts):
    return [Request(prompt, g) for prompt in prompts for g in range(4)]


def test_a_completion_does_not_depend_on_its_batch(policy, requests):
    together = sample(policy, requests)
    assert len({c.length for c in together}) > 3  # rows did leave the batch at different times
    for batch_size in (1, 5):
        backwards = sample(policy, requests[::-1], batch_size=batch_size)[::-1]
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(together, backwards, strict=True))


def test_a_completion_is_a_function_of_seed_iteration_prompt_and_sample(policy, requests):
    first = sample(policy, requests)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, sample(policy, requests), strict=True))
    for change in ({"seed": 1}, {"iteration": 2}):
        assert any(
            not torch.equal(a.ids, b.ids) for a, b in zip(first, sample(policy, requests, **change), strict=True)
        )
    assert len({tuple(c.ids.tolist()) for c in first[:4]}) > 1


def test_records_are_those_of_a_naive_pass(policy, requests):
    base = 0.9
    completions = sample(policy, requests, base=base)
    with torch.no_grad():
        logp, entropy = policy.completion_logprobs(Sequences.of(completions), base)
    for i, c in enumerate(completions):
        ids = torch.tensor([*c.prompt.ids, *c.ids.tolist()])[None]
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(c.prompt.ids) - 1 : -1].float()
        temperature = adaptive_temperature(entropy[i, : c.length], SIGNAL, base)
        at_own_temperature = (logits / temperature[:, None]).log_softmax(-1).gather(1, c.ids[:, None]).squeeze(1)
        assert torch.allclose(c.base_logp, logp[i, : c.length], atol=2e-5)
        assert torch.allclose(c.entropy, entropy[i, : c.length], atol=2e-5)
        assert torch.allclose(c.temperature, temperature, atol=1e-4)
        assert torch.allclose(c.sampling_logp, at_own_temperature, atol=1e-4)


def test_rows_stop_at_any_stop_id_and_only_there(policy, requests):
    stops = set(policy.stop_ids)
    for c in sample(policy, requests, limit=24):
        inside = set(c.ids[:-1].tolist())
        assert not inside & stops
        assert c.truncated == (int(c.ids[-1]) not in stops)
        assert c.length <= 24 and (c.length == 24 or not c.truncated)


def test_without_a_stop_id_every_row_runs_to_the_limit(policy, requests):
    endless = Policy(policy.model, policy.tokenizer, (383,), policy.context)  # an id beyond the tokenizer's
    assert all(c.truncated and c.length == 9 for c in sample(endless, requests, limit=9))


def test_the_signal_widens_uncertain_tokens_and_narrows_certain_ones(policy, requests):
    flat = sample(policy, requests, signal=None)
    assert all(bool((c.temperature == 1.0).all()) for c in flat)
    temperature = torch.cat([c.temperature for c in sample(policy, requests)])
    entropy = torch.cat([c.entropy for c in sample(policy, requests)])
    above = SIGNAL.above(entropy)
    # Next to the pivot, a temperature above 1 rounds to 1.
    assert bool((temperature[above] >= 1.0).all()) and bool((temperature[~above] <= 1.0).all())
    assert temperature.min() < 0.97 and temperature.max() > 1.03


def test_the_processor_works_with_plain_generate(policy, prompts):
    """It is a logits processor like any other: any batch, any decoding loop."""
    seen = []

    class Watched(AdaptiveTemperature):
        def adapted(self, logits):
            seen.append(super().adapted(logits))
            return seen[-1]

    ids = torch.tensor(prompts[0].ids)[None].repeat(3, 1)
    with policy.sampling() as model:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=5, do_sample=True, top_k=0, pad_token_id=0),
            logits_processor=LogitsProcessorList([Watched(SIGNAL)]),
        )
    assert out.shape[0] == 3 and seen[-1].temperature.shape == (3,)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        # Probabilities .5, .25, .15, .1: the fewest that hold .7 are the first two, and those that hold .75 are too.
        (0.7, 2),
        (0.76, 3),
        (0.4, 1),
        (1.0, 4),
    ],
)
def test_top_p_keeps_the_fewest_likeliest_tokens_by_hand(top_p, kept):
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    scores = AdaptiveTemperature(None, top_p=top_p)(None, logits)
    order = [1, 3, 2, 0]
    assert scores[0, order].isfinite().tolist() == [i < kept for i in range(4)]
    assert torch.equal(scores[0, order[:kept]], logits[0, order[:kept]])


def test_top_p_is_that_of_transformers():
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)) * 4
    theirs = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.7)])(None, logits)
    processor = AdaptiveTemperature(None, 0.5, top_p=0.7)
    ours = processor(None, logits)
    assert torch.equal(ours, theirs)
    assert 1 < ours.isfinite().sum(1).float().mean() < 300
    # What it says it saw is the whole distribution, not the nucleus.
    whole = torch.distributions.Categorical(logits=logits.double() / 0.5)
    assert torch.allclose(processor.adapted(logits).entropy.double(), whole.entropy(), atol=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (3, 1.0, 3),
        (9, 1.0, 4),
        # Of the three likeliest, .5, .25, .15, the first two hold .83 of what is left.
        (3, 0.8, 2),
        (1, 1.0, 1),
    ],
)
def test_top_k_comes_before_top_p(top_k, top_p, kept):
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    scores = AdaptiveTemperature(None, top_p=top_p, top_k=top_k)(None, logits)
    assert scores[0, [1, 3, 2, 0]].isfinite().tolist() == [i < kept for i in range(4)]


def test_plain_generate_writes_the_same_completions(policy, requests):
    """Rows that have ended stay in its batch, and each reads its prompt for itself."""
    theirs = sample(policy, requests)
    engine = GenerateEngine(policy, 64, 24)
    ours = engine.sample(requests, AdaptiveTemperature(SIGNAL), DrawKey(0, Stage.TRAINING, 1))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.ids, b.ids) and (a.text, a.truncated) == (b.text, b.truncated)
        for name in ("sampling_logp", "base_logp", "entropy", "temperature"):
            assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-4), name
    assert {c.truncated for c in ours} == {True, False} and policy.model.training


def test_a_sampler_that_does_not_take_the_forced_token_is_caught(policy, requests):
    class Headstrong(GenerateEngine):
        def generator(self, model):
            def generate(**arguments):
                return (model.generate(**arguments) + 1) % model.config.vocab_size

            return generate

    with pytest.raises(RuntimeError, match="returned other tokens than were drawn"):
        Headstrong(policy, 64, 24).sample(requests[:2], AdaptiveTemperature(None), DrawKey(0, Stage.TRAINING, 1))


@pytest.mark.parametrize(
    ("min_p", "top_p", "kept"),
    [
        # Probabilities .5, .25, .15, .1: at least a fifth of .5 is .1, at least half of it .25.
        (0.19, 1.0, 4),
        (0.21, 1.0, 3),
        (0.49, 1.0, 2),
        (1.0, 1.0, 1),
        # Within the nucleus of the first two, whose ratio stays a half.
        (0.1, 0.7, 2),
        (0.6, 0.7, 1),
    ],
)
def test_min_p_keeps_what_is_likely_beside_the_likeliest_by_hand(min_p, top_p, kept):
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    scores = AdaptiveTemperature(None, top_p=top_p, min_p=min_p)(None, logits)
    assert scores[0, [1, 3, 2, 0]].isfinite().tolist() == [i < kept for i in range(4)]


def test_min_p_is_that_of_transformers_at_each_tokens_own_temperature():
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(0)) * 4
    theirs = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)])
    ours = AdaptiveTemperature(None, 0.5, top_p=0.9, min_p=0.1)(None, logits)
    assert torch.equal(ours, theirs(None, logits))
    # With a signal the threshold follows the temperature: it is that of the distribution that is drawn from.
    adapted = AdaptiveTemperature(SIGNAL, 0.9, tau=0.5, min_p=0.1).adapted(logits)
    assert float(adapted.temperature.max() - adapted.temperature.min()) > 0.1
    for row, temperature, scores in zip(logits, adapted.temperature, adapted.scores, strict=True):
        probability = (row / temperature).softmax(-1)
        near = (probability / probability.max() - 0.1).abs() < 1e-5
        assert torch.equal(scores.isfinite() | near, (probability >= 0.1 * probability.max()) | near)


def test_min_p_records_the_log_probability_among_the_kept(policy, requests):
    completions = sample(policy, requests, signal=None, base=0.8, min_p=0.2)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), MinPLogitsWarper(0.2)])
    grown = 0
    for c in completions:
        ids = torch.tensor([*c.prompt.ids, *c.ids.tolist()])[None]
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(c.prompt.ids) - 1 : -1].float()
        logp = warpers(None, logits).log_softmax(-1).gather(1, c.ids[:, None]).squeeze(1)
        assert torch.allclose(c.sampling_logp, logp, atol=1e-4)
        grown += int((c.sampling_logp > c.base_logp + 1e-3).sum())
    assert grown > 20


def test_top_p_records_the_log_probability_in_the_nucleus(policy, requests):
    completions = sample(policy, requests, signal=None, base=0.8, top_p=0.7)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.7)])
    inside = 0
    for c in completions:
        ids = torch.tensor([*c.prompt.ids, *c.ids.tolist()])[None]
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(c.prompt.ids) - 1 : -1].float()
        logp = warpers(None, logits).log_softmax(-1).gather(1, c.ids[:, None]).squeeze(1)
        assert torch.allclose(c.sampling_logp, logp, atol=1e-4)
        inside += int((c.sampling_logp > c.base_logp + 1e-3).sum())
    assert inside > 20  # tokens whose probability grew because others were cut
    alone = sample(policy, requests[::-1], signal=None, base=0.8, top_p=0.7, batch_size=1)[::-1]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(completions, alone, strict=True))


def test_a_draw_is_from_the_distribution():
    logits = torch.tensor([0.0, 1.0, float("-inf"), 2.0, -3.0])
    n = 40_000
    u = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw_token(logits.expand(n, 5), u)[0], minlength=5) / n
    assert torch.allclose(counts, logits.softmax(-1), atol=0.01)
    assert counts[2] == 0.0


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-53])
def test_a_draw_is_never_an_impossible_token(u):
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]])
    assert int(draw_token(logits, torch.tensor([u], dtype=torch.float64))[0]) == (1 if u == 0.0 else 2)


def test_uniforms_differ_in_every_argument():
    key = DrawKey(0, Stage.TRAINING, 1)
    reference = uniforms(key, 2, 3, 8)
    assert torch.equal(reference, uniforms(key, 2, 3, 8))
    assert torch.equal(reference[:5], uniforms(key, 2, 3, 5))
    for change in range(5):
        arguments = [0, 0, 1, 2, 3, 8]
        arguments[change] += 1
        assert not torch.equal(reference, uniforms(DrawKey(*arguments[:3]), *arguments[3:]))


@pytest.mark.parametrize(("stage", "number"), [("TRAINING", 0), ("EVALUATION", 1), ("BENCHMARK", 2), ("CANARY", 3)])
def test_the_random_numbers_of_a_stage_are_fixed(stage, number, requests):
    """To the bit: a run that was begun with an earlier version goes on as it would have."""
    key = DrawKey(7, Stage[stage], 2)
    for prompt, chosen in ((0, 0), (5, 3)):
        expected = np.random.default_rng((7, number, 2, prompt, chosen)).random(6)
        assert uniforms(key, prompt, chosen, 6).tolist() == expected.tolist()
    rows = [uniforms(key, r.prompt.index, r.sample, 6) for r in requests]
    assert torch.equal(draws_of(requests, key, 6), torch.stack(rows, dim=1))


def test_the_three_numbers_of_a_key_may_be_given_by_position(policy, requests):
    engine, processor = TransformersEngine(policy, 64, 24), AdaptiveTemperature(SIGNAL)
    key = DrawKey(3, Stage.CANARY, 1)
    whole = engine.sample(requests, processor, key)
    same_ids(whole, engine.sample(requests, processor, 3, 3, 1))
    cut = engine.sample(requests, processor, key, limit=6)
    assert max(c.length for c in cut) == 6 < max(c.length for c in whole)
    same_ids(cut, engine.sample(requests, processor, key, 6))
    same_ids(cut, engine.sample(requests, processor, key=key, limit=6))
    same_ids(cut, engine.sample(requests, processor, 3, 3, 1, limit=6))
    same_ids(cut, engine.sample(requests, processor, 3, 3, 1, 6))
    for wrong in ((3,), (3, 3), (3, 3, 1, 6, 6), (key, 3, 1)):
        with pytest.raises(TypeError, match="sample takes"):
            engine.sample(requests, processor, *wrong)
    with pytest.raises(TypeError, match="one limit"):
        engine.sample(requests, processor, key, 6, limit=6)


def same_ids(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(ours, theirs, strict=True))


def test_an_adaptive_temperature_keeps_nothing_between_calls():
    processor = AdaptiveTemperature(SIGNAL, 0.9, top_p=0.8, top_k=20)
    before = dict(vars(processor))
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    first, other, again = (draw(processor, z, uniform) for z in (logits, logits[:, :30], logits))
    assert vars(processor) == before
    for name in ("ids", "sampling_logp", "base_logp", "entropy", "temperature", "scores"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.scores, processor(None, logits)) and other.scores.shape == (4, 30)
