"""Evaluation, the inspector's generation and the probes of an export on a pretended GPU."""

from __future__ import annotations

import math

import pytest

from hapo_lite.algo.methods import PRESETS
from hapo_lite.evaluate import session
from hapo_lite.evaluate.evaluation import evaluate
from hapo_lite.export.parity import effect_of_adapter, measure_drift, refer
from hapo_lite.export.probes import Probes, compute_in_fp32
from hapo_lite.inspect.generate import GenerationSettings, generate
from hapo_lite.rollout.decoding import LOOK_EVERY
from tests.pretend_gpu.conftest import KINDS, model_settings, policy_of
from tests.pretend_gpu.test_rollout import A_BATCH, A_PASS

A_SHOWN_TOKEN = 1
"""Waits of the inspector for a token at most: all that a look shows comes to the host at once."""
GREEDY = (7, 2)
"""Waits of `generate` for greedy answers, for all of them and for a step."""


@pytest.mark.parametrize("kind", KINDS)
def test_held_out(kind, stage, make_loop):
    with stage("evaluation: held-out prompts", kind) as seen:
        loop = make_loop(kind, "evaluation.prompts=4", "evaluation.samples=4")
        found = loop.evaluate(1)
        seen.budget = A_BATCH + math.ceil(max(c.length for c in found.graded.completions) / LOOK_EVERY)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate(kind, stage, make_recipe, monkeypatch):
    model = model_settings(kind)
    recipe = make_recipe(
        f"model.dtype={model.dtype}", f"model.quantization={model.quantization}", "benchmark.suites=[tiny]",
        "benchmark.limit=4", "benchmark.samples=4", "benchmark.top_p=0.95",
    )  # fmt: skip
    monkeypatch.setattr(session, "load_policy", lambda *_: policy_of(kind))
    with stage("evaluation: a suite, the base", kind) as seen:
        summary = evaluate(recipe)["tiny"]
        seen.budget = A_BATCH + recipe.rollout.max_new_tokens // LOOK_EVERY
    assert summary["prompts"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_inspector(kind, stage):
    policy = policy_of(kind)
    settings = GenerationSettings("12+3*4=?", method=PRESETS["hapo"], max_new_tokens=24)
    with stage("inspector", kind) as seen:
        shown = list(generate(policy, settings))
        # The last token of the first pass is not shown.
        seen.budget = A_SHOWN_TOKEN * (len(shown) + 1)
    assert shown[-1].ended and shown[0].first_pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_probes_of_an_export(kind, stage):
    policy = policy_of(kind)
    prompts = tuple(tuple(policy.encode([{"role": "user", "content": text}])) for text in ("1+1=?", "12*3=?", "9-4=?"))
    probes = Probes(tuple((prompt, (5, 6, 7, 8)) for prompt in prompts), prompts)
    with stage("export: probes", kind) as seen:
        wide = compute_in_fp32(policy)
        reference = refer(wide, probes)
        effect = effect_of_adapter(wide, reference)
        drift = measure_drift(wide, probes, reference, effect, next(iter(policy.model.parameters())).dtype)
        steps = max(map(len, reference.answers))
        seen.budget = 3 * A_PASS + 2 * (GREEDY[0] + GREEDY[1] * steps)
    assert drift.mean == 0.0 and drift.same == len(prompts)
