"""How completions are dealt to optimiser steps and micro-batches, as properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.tasks.stream import PromptStream
from hapo_lite.train.batching import deal_updates, micro_batches


@given(count=st.integers(0, 200), updates=st.integers(1, 20), seed=st.integers(0, 99), iteration=st.integers(0, 99))
def test_every_completion_is_dealt_once_and_evenly(count, updates, seed, iteration):
    parts = deal_updates(count, updates, seed, iteration)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert len(parts) == updates
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == deal_updates(count, updates, seed, iteration)


@given(lengths=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(1, 300))
def test_micro_batches_stay_within_the_budget(lengths, budget):
    batches = micro_batches(range(len(lengths)), lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_shuffling_depends_on_seed_and_iteration():
    dealt = {tuple(map(tuple, deal_updates(30, 3, seed, iteration))) for seed in (0, 1) for iteration in (1, 2)}
    assert len(dealt) == 4


def test_the_stream_takes_every_prompt_once_an_epoch_and_from_anywhere():
    prompts = [EncodedPrompt(i, Prompt(str(i), (), ""), ()) for i in range(7)]
    stream = PromptStream(prompts, seed=3)
    taken = stream.take(0, 21)
    assert [p.index for p in taken] == list(range(21))
    epochs = [[p.prompt.id for p in taken[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(p.prompt.id for p in prompts) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert PromptStream(prompts, seed=3).take(10, 4) == taken[10:14]  # a resumed run starts in the middle
