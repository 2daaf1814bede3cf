"""vLLM: the processor in both interfaces, fed as vLLM feeds it, and the engine itself where vLLM can be started."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.recipe import load_recipe
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout import vllm_engine
from hapo_lite.rollout.canary import check_engine
from hapo_lite.rollout.draws import DrawKey, Stage, draws_of
from hapo_lite.rollout.engine import EngineSettings, make_engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import ForcedSampler
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.rollout.vllm_processor import (
    NOBODY,
    NUMBER,
    BatchRows,
    SharedSampler,
    SlotRows,
    batch_processor,
    slot_processor,
)
from hapo_lite.runs.interrupt import Interrupted, Interrupts, signals_held
from hapo_lite.tiny.task import problems
from tests.conftest import TINY, noisy_adapter

SIGNAL = EntropySignal(pivot=-1.5, sigma=3.0, high=2.0, low=6.0)
KEY = DrawKey(1, Stage.TRAINING, 2)
LIMIT, ROWS = 14, 3
SETTINGS = ["rollout.engine=vllm", "model.quantization=none", "data.max_prompt_tokens=64", "rollout.batch_size=4"]


@pytest.fixture(scope="module")
def policy():
    return load_policy(load_recipe(TINY, SETTINGS).model, 0, "cpu")


@pytest.fixture(scope="module")
def requests(policy):
    texts = [p.prompt for p in problems("train")[:4]]
    ids = [tuple(policy.encode([{"role": "user", "content": text}])) for text in texts]
    prompts = [EncodedPrompt(i, Prompt(str(i), (("user", text),), "0"), ids[i]) for i, text in enumerate(texts)]
    return [Request(prompt, sample) for prompt in prompts for sample in range(2)]


@pytest.fixture(scope="module")
def expected(policy, requests):
    return TransformersEngine(policy, 64, LIMIT).sample(requests, AdaptiveTemperature(SIGNAL, 1.1), KEY)


@pytest.fixture
def shared(policy, requests):
    shared = SharedSampler()
    shared.forced = ForcedSampler(AdaptiveTemperature(SIGNAL, 1.1), draws_of(requests, KEY, LIMIT))
    shared.prompt_lengths = torch.tensor([len(r.prompt.ids) for r in requests])
    return shared


class Writing:
    """A request as vLLM's scheduler has it. read: the prompt tokens that the model has seen, in the first step half."""

    def __init__(self, number, request, policy):
        self.prompt, self.policy, self.written, self.read = list(request.prompt.ids), policy, [], 0
        self.params = SimpleNamespace(extra_args={NUMBER: number})

    def logits(self):
        self.read = len(self.prompt) if self.read else len(self.prompt) // 2
        with torch.no_grad():
            return self.policy.model(torch.tensor([self.prompt[: self.read] + self.written])).logits[0, -1].float()

    def take(self, token):
        if self.read == len(self.prompt):
            self.written.append(token)

    @property
    def ended(self):
        return len(self.written) == LIMIT or (self.written[-1:] and self.written[-1] in self.policy.stop_ids)


def same(shared, requests, expected, policy, written):
    ours = shared.forced.completions(requests, written, policy)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.ids, b.ids) and (a.text, a.truncated) == (b.text, b.truncated)
        for name in ("sampling_logp", "base_logp", "entropy", "temperature"):
            assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-4), name
    assert {c.truncated for c in ours} == {True, False}


class Plain:
    """vLLM's own types in a word, for where it is not installed."""

    SWAP, ONE_WAY = SimpleNamespace(name="SWAP"), SimpleNamespace(name="UNIDIRECTIONAL")
    update = staticmethod(SimpleNamespace)


def first_interface(shared, real):
    if not real:
        rows = BatchRows(shared)
        return Plain, rows.update, rows.apply
    module = pytest.importorskip("vllm.v1.sample.logits_processor", reason="vLLM is not installed")
    processor = batch_processor(shared)(None, torch.device("cpu"), False)
    assert isinstance(processor, module.LogitsProcessor) and not processor.is_argmax_invariant()
    moves = module.MoveDirectionality
    types = SimpleNamespace(SWAP=moves.SWAP, ONE_WAY=moves.UNIDIRECTIONAL, update=module.BatchUpdate)
    return types, processor.update_state, processor.apply


@pytest.mark.parametrize("real", [False, True])
def test_the_first_interface_follows_requests_through_the_batch(policy, requests, expected, shared, real):
    """Places are filled again, the last row moves into a gap, rows change places: the completions are the same."""
    types, update, apply = first_interface(shared, real)
    everyone = [Writing(i, r, policy) for i, r in enumerate(requests)]
    waiting, batch, chance, seen = everyone[::-1], [], random.Random(0), set()
    while waiting or batch:
        gaps = [i for i, w in enumerate(batch) if w.ended]
        added, moved = [], []
        while waiting and (gaps or len(batch) < ROWS):
            new = waiting.pop()
            place = gaps.pop(0) if gaps else len(batch)
            batch[place : place + 1] = [new]
            added.append((place, new.params, new.prompt, new.written))
        removed = list(gaps)[::-1]
        for gap in gaps:
            while batch and batch[-1].ended:
                batch.pop()
            if gap < len(batch):
                moved.append((len(batch) - 1, gap, types.ONE_WAY))
                removed.remove(gap)  # as vLLM has it: a gap that was filled is not told of
                batch[gap] = batch.pop()
        if len(batch) > 1 and chance.random() < 0.4:
            a, b = chance.sample(range(len(batch)), 2)
            moved.append((a, b, types.SWAP))
            batch[a], batch[b] = batch[b], batch[a]
        seen |= {direction.name for *_, direction in moved}
        changed = added or removed or moved
        update(types.update(batch_size=len(batch), removed=removed, added=added, moved=moved) if changed else None)
        if batch:
            for w, token in zip(
                batch, apply(torch.stack([w.logits() for w in batch])).argmax(-1).tolist(), strict=True
            ):
                w.take(token)
    assert seen == {"SWAP", "UNIDIRECTIONAL"}
    same(shared, requests, expected, policy, [w.written for w in everyone])


def second_interface(shared, real):
    if not real:
        rows = SlotRows(shared, ROWS + 1, torch.device("cpu"))
        return rows.add, rows.flush, lambda logits, slots, pos: rows.apply(logits, slots, pos)
    module = pytest.importorskip("vllm.v1.worker.gpu.sample.logits_processor", reason="vLLM is not installed")
    processor = slot_processor(shared)(None, SimpleNamespace(max_num_reqs=ROWS + 1, device=torch.device("cpu")))
    assert isinstance(processor, module.LogitsProcessor)

    def apply(logits, slots, positions):
        rest = dict.fromkeys(("idx_mapping", "idx_mapping_np", "expanded_local_pos", "input_ids"))
        context = module.LogitsContext(expanded_idx_mapping=slots, pos=positions, seq_lens_upper_bound_np=None, **rest)
        return processor.apply(logits, context)

    return processor.add_request, processor.apply_staged_writes, apply


@pytest.mark.parametrize("real", [False, True])
def test_the_second_interface_finds_a_request_by_its_slot(policy, requests, expected, shared, real):
    """Rows are shuffled in every step, slots are used again, and one is somebody else's and left as it is."""
    add, flush, apply = second_interface(shared, real)
    everyone = [Writing(i, r, policy) for i, r in enumerate(requests)]
    waiting, slots, free, chance = everyone[::-1], {}, list(range(ROWS)), random.Random(0)
    assert not add(ROWS, SimpleNamespace(extra_args=None))
    foreign = torch.randn(policy.model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    while waiting or slots:
        while waiting and free:
            slot = free.pop(0)
            slots[slot] = waiting.pop()
            assert add(slot, slots[slot].params)
        flush()
        order = chance.sample(sorted(slots), len(slots))
        logits = torch.stack([*(slots[s].logits() for s in order), foreign])
        positions = torch.tensor([*(slots[s].read + len(slots[s].written) - 1 for s in order), 3])
        chosen = apply(logits, torch.tensor([*order, ROWS]), positions)
        assert torch.equal(chosen[-1], foreign)
        for slot, token in zip(order, chosen[:-1].argmax(-1).tolist(), strict=True):
            slots[slot].take(token)
            if slots[slot].ended:
                del slots[slot]
                free.append(slot)
    same(shared, requests, expected, policy, [w.written for w in everyone])


def test_rows_beyond_a_completion_and_without_a_writer_are_left_alone(shared):
    logits = torch.randn(4, 50)
    requests, steps = torch.tensor([NOBODY, 0, 1, 2]), torch.tensor([0, -1, LIMIT, LIMIT + 1])
    assert torch.equal(shared.write(logits.clone(), requests, steps), logits)
    assert torch.equal(SharedSampler().write(logits.clone(), torch.zeros(4).long(), torch.zeros(4).long()), logits)


def test_an_engine_that_is_not_installed_names_its_extra(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"engine = vllm cannot be imported .*: pip install -e \.\[vllm\]"):
        make_engine(load_recipe(TINY, SETTINGS), policy)
    recipe = load_recipe(TINY, ["rollout.engine=vllm", "model.dtype=bf16"])
    quantised = load_policy(recipe.model, 0, "cpu")
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="vllm-bnb-plugin"):
        vllm_engine.engine_arguments(EngineSettings.of(recipe, 10), quantised)


def test_what_vllm_is_started_with(policy):
    recipe = load_recipe(TINY, [*SETTINGS, "model.lora.rank=20"])
    found = vllm_engine.engine_arguments(EngineSettings.of(recipe, 100), policy)
    assert found["max_lora_rank"] == 32 and found["max_model_len"] == 164 and found["dtype"] == "float32"
    assert "quantization" not in found and "enable_sleep_mode" not in found
    for override, message in (
        ("model.lora.rank=600", "lower it to 512"),
        ("model.quantization=nf4", "no 4-bit base"),
    ):
        with pytest.raises(UserError, match=message):
            vllm_engine.engine_arguments(EngineSettings.of(load_recipe(TINY, [*SETTINGS, override]), 100), policy)


@pytest.fixture(scope="module")
def engine(policy):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    if importlib.util.find_spec("vllm.spinloop") is None:
        pytest.skip("vLLM is here without its compiled parts")
    return make_engine(load_recipe(TINY, SETTINGS), policy)


def test_vllm_writes_what_the_default_engine_writes(engine, policy, requests):
    default = TransformersEngine(policy, 64, LIMIT)

    def check(processor):
        theirs = default.sample(requests, processor, KEY)
        for a, b in zip(engine.sample(requests, processor, KEY, LIMIT), theirs, strict=True):
            assert torch.equal(a.ids, b.ids) and (a.text, a.truncated) == (b.text, b.truncated)
            for name in ("sampling_logp", "base_logp", "entropy", "temperature"):
                assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-4), name
        return theirs

    with noisy_adapter(policy, 0.05, 3):
        with_adapter = check(AdaptiveTemperature(SIGNAL, 1.1))
        check(AdaptiveTemperature(SIGNAL, 1.1, top_p=0.7))
        with policy.base_alone():
            without = check(AdaptiveTemperature(SIGNAL, 1.1))
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(with_adapter, without, strict=True))


def test_vllm_passes_the_check_before_training(engine, policy, requests, make_loop):
    recipe = load_recipe(TINY, ["model.quantization=none", "data.limit=32", "evaluation.prompts=0"])
    accelerator = make_loop(recipe).accelerator
    found = check_engine(engine, policy, [r.prompt for r in requests[::2]], recipe.rollout, recipe.seed, accelerator)
    assert max(found.at_rest.engine, found.perturbed.engine) < 1e-4 < found.followed


def test_vllm_is_ready_again_after_a_signal(engine, policy, requests):
    class Signalling(AdaptiveTemperature):
        called = False

        def adapted(self, logits):
            if not self.called:
                self.called = True
                os.kill(os.getpid(), signal.SIGTERM)
            return super().adapted(logits)

    with pytest.raises(Interrupted), Interrupts().listening():
        engine.sample(requests, Signalling(None), KEY, LIMIT)
    theirs = TransformersEngine(policy, 64, LIMIT).sample(requests, AdaptiveTemperature(SIGNAL), KEY)
    ours = engine.sample(requests, AdaptiveTemperature(SIGNAL), KEY, LIMIT)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(ours, theirs, strict=True))


def test_a_signal_waits_for_the_end_of_a_step():
    reached = []
    with pytest.raises(Interrupted), Interrupts().listening():
        with signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end of the step")
        reached.append("the next step")
    assert reached == ["the end of the step"]
