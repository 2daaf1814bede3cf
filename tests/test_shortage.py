"""Memory runs out in a run: the step is done again in smaller pieces, with the same gradient, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.model.unpacked import Unpacking
from hapo_lite.preflight.measure import measure_loop, prepare
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.train import run
from hapo_lite.train.__main__ import main
from hapo_lite.train.oom_retry import OomRetry
from tests.commands import own_precision
from tests.conftest import ROOT, TINY
from tests.loops import adapter_digest

TOO_MUCH = 1 << 60
"""Bytes that no machine has: the allocator itself fails."""


class SmallMemory:
    """While it lasts, the decoder's forward really runs out of memory where `fits(tokens, learning)` is False."""

    def __init__(self, policy, fits) -> None:
        self.fits, self.refused = fits, []
        decoder = policy.model.get_base_model().get_decoder()
        self.handle = decoder.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module, inputs, options):
        ids = options["input_ids"]
        if not self.fits(ids.numel(), torch.is_grad_enabled()):
            self.refused.append(ids.numel())
            torch.empty(TOO_MUCH, dtype=torch.uint8)


def flat(loop) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in loop.learner.parameters]).double()


def test_what_counts_as_a_shortage():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    )
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    for text in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
        "CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text)), text
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(
        ValueError()
    )


def test_short_in_scoring_is_a_run_that_had_the_smaller_budget(make_recipe, make_loop):
    """To the last bit: scoring and update use the same micro-batches, so ratio = 1 holds too."""
    loop = make_loop(make_recipe("training.micro_batch_tokens=100000"))
    told = []
    loop.resources.oom.tell = lambda sentence, whole: told.append((sentence, whole))
    rollout = loop.sample

    def until_scoring(*arguments):
        memory.fits = lambda tokens, learning: True
        collected = rollout(*arguments)
        memory.fits = lambda tokens, learning: tokens <= 300
        return collected

    loop.sample = until_scoring
    memory = SmallMemory(loop.policy, lambda tokens, learning: True)
    state, metrics, _ = loop.step(TrainState())
    assert metrics["memory/shortages"] == len(told) == len(memory.refused) > 0 and all(whole for _, whole in told)
    assert told[0][0].startswith("memory ran out in the scoring (") and "allocat" in told[0][0]
    assert f"done again with training.micro_batch_tokens = {loop.resources.oom.tokens}" in told[-1][0]
    same = make_loop(make_recipe(f"training.micro_batch_tokens={loop.resources.oom.tokens}"))
    expected, reference, _ = same.step(TrainState())
    assert adapter_digest(loop) == adapter_digest(same) and state == expected
    # What fitted is remembered: the next iteration is not short again.
    assert loop.step(state)[1]["memory/shortages"] == 0 == reference["memory/shortages"]


def test_short_in_the_middle_of_an_update_learns_the_same(make_recipe, make_loop):
    """Gradients of the micro-batches that had fitted are dropped, not counted twice."""
    loops = [make_loop(make_recipe("training.micro_batch_tokens=200")) for _ in range(2)]
    loops[0].policy.dense.wanted = Unpacking.NEVER
    before, calls, told = flat(loops[0]), [0], []

    def fits(tokens, learning):
        calls[0] += learning
        return not (learning and calls[0] in (2, 7))

    memory = SmallMemory(loops[0].policy, fits)
    loops[0].resources.oom.tell = lambda sentence, whole: told.append(whole)
    lines = [loop.step(TrainState())[1] for loop in loops]
    assert len(memory.refused) == 2 == lines[0]["memory/shortages"]
    assert told[0] is True  # before the first step the weights are the checkpoint's
    change = flat(loops[1]) - before
    assert float((flat(loops[0]) - flat(loops[1])).norm() / change.norm()) < 2e-5
    for name in ("update/loss", "update/grad_norm"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4, abs=1e-6)


def test_another_error_is_not_tried_again(make_recipe, make_loop):
    loop = make_loop(make_recipe())

    def broken(*_):
        raise RuntimeError("something else")

    loop.policy.model.get_base_model().get_decoder().register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="something else"):
        loop.step(TrainState())
    assert loop.resources.oom.count == 0


def test_short_in_the_rollout_writes_the_same_completions(make_recipe, make_loop):
    loop = make_loop(make_recipe("rollout.batch_size=16"))
    loop.policy.dense.wanted = Unpacking.NEVER
    expected = loop.sample(TrainState(iteration=1))
    memory = SmallMemory(loop.policy, lambda tokens, learning: tokens != 16)  # a step of 16 rows
    collected = loop.sample(TrainState(iteration=1))
    assert memory.refused == [16] and loop.collector.engine.batch_size == 8 and loop.resources.oom.count == 1
    for a, b in zip(collected.completions, expected.completions, strict=True):
        assert torch.equal(a.ids, b.ids)
    memory.fits = lambda tokens, learning: False
    with pytest.raises(UserError, match="memory ran out in the rollout with one completion at a time"):
        loop.sample(TrainState(iteration=1))


@pytest.mark.parametrize("wanted", [Unpacking.IF_FREE, Unpacking.DECIDED, Unpacking.ALWAYS])
@pytest.mark.parametrize("stage", ["rollout", "scoring", "update"])
def test_a_copy_of_the_base_is_given_up_before_a_batch_is_halved(make_recipe, make_loop, stage, wanted):
    """A step fits beside a packed base, and not beside the copy. A copy that the recipe asks for stays."""
    recipe = make_recipe("rollout.batch_size=16", "training.micro_batch_tokens=400")
    loop, same = make_loop(recipe), make_loop(recipe)
    dense, oom, told = loop.policy.dense, loop.resources.oom, []
    dense.wanted = wanted
    oom.tell = lambda sentence, whole: told.append(sentence)
    here = {"rollout": False, "scoring": False, "update": True}

    def fits(tokens, learning):
        copied = any("forward" in vars(layer) for layer in dense._layers)
        large = tokens == 16 if stage == "rollout" else tokens > 300
        return not (copied and large and learning == here[stage])

    memory = SmallMemory(loop.policy, fits)
    state, metrics, _ = loop.step(TrainState())
    assert metrics["memory/shortages"] == len(told) == len(memory.refused) > 0
    if wanted is Unpacking.ALWAYS:
        assert not dense.given_up and dense.wanted is wanted
        assert loop.collector.engine.batch_size == 8 if stage == "rollout" else oom.tokens <= 300
        return
    assert dense.given_up and len(told) == 1 and told[0].startswith(f"memory ran out in the {stage} (")
    assert told[0].endswith("done again with rollout.unpacked_base = never")
    assert loop.collector.engine.batch_size == 16 and oom.tokens is None
    assert state == same.step(TrainState()).state and adapter_digest(loop) == adapter_digest(same)
    assert loop.step(state).metrics["memory/shortages"] == 0


def test_preflight_says_that_the_copy_was_given_up(make_recipe):
    with own_precision():
        worst = prepare(make_recipe("rollout.batch_size=16"))
        dense = worst.loop.policy.dense
        dense.wanted = Unpacking.DECIDED
        SmallMemory(
            worst.loop.policy,
            lambda tokens, learning: learning or not any("forward" in vars(layer) for layer in dense._layers),
        )
        measured = measure_loop(worst, lambda sentence: None)
    assert measured.fitted == {"rollout.unpacked_base": "never", "rollout.batch_size": 16}


def test_the_last_sentence_names_a_copy_that_was_asked_for(make_recipe, make_loop):
    loop = make_loop(make_recipe())
    loop.policy.dense.wanted = Unpacking.ALWAYS
    SmallMemory(loop.policy, lambda tokens, learning: False)
    with pytest.raises(UserError, match=r"one completion at a time .*: set rollout.unpacked_base=auto, or lower roll"):
        loop.sample(TrainState(iteration=1))


def test_what_does_not_fit_at_all_stops_with_a_sentence_and_loses_nothing(tmp_path, capsys, monkeypatch):
    load, memories = run.load_policy, []

    def small(*arguments, **options):
        policy = load(*arguments, **options)
        begun = [0]

        def fits(tokens, learning):
            begun[0] += learning
            return begun[0] <= 3  # the check before training, and the two steps of the first iteration

        memories.append(SmallMemory(policy, fits))
        return policy

    arguments = [
        str(TINY),
        f"output_dir={tmp_path}",
        "rollout.prompts_per_iteration=4",
        "rollout.completions_per_prompt=4",
        "training.updates_per_iteration=2",
        "training.iterations=2",
        "training.micro_batch_tokens=100000",
        "evaluation.prompts=0",
        "checkpoint.every=0",
        "data.limit=64",
        "logging.progress=false",
    ]
    monkeypatch.setattr(run, "load_policy", small)
    assert run_command(main, arguments) == 2
    printed = capsys.readouterr()
    assert "memory ran out in the update with one sequence at a time" in printed.err and "Traceback" not in printed.err
    assert "set model.gradient_checkpointing=true" in printed.err
    assert printed.out.count("note: iteration 2: memory ran out in the update") > 1
    assert [p.name for p in (tmp_path / "tiny_cpu" / "checkpoints").iterdir()] == ["000001"]
    monkeypatch.setattr(run, "load_policy", load)
    # What the sentence asks for may be changed without becoming another run.
    assert run_command(main, [*arguments, "model.gradient_checkpointing=true"]) == 0


def test_a_shortage_where_nothing_can_be_halved_is_one_sentence(capsys):
    assert run_command(lambda argv: torch.empty(TOO_MUCH, dtype=torch.uint8)) == 2
    assert capsys.readouterr().err.startswith("error: memory ran out (")


TWO = """
import os, sys
import torch
from accelerate import Accelerator
from hapo_lite.model.oom import OutOfMemory
from hapo_lite.train.oom_retry import OomRetry

# The two meet in a file, since a port that is free when it is looked for may be taken when it is used.
torch.distributed.init_process_group("gloo", f"file://{sys.argv[1]}", rank=int(os.environ["RANK"]), world_size=2)
accelerator = Accelerator(cpu=True)
shortage = OomRetry(accelerator)

def work(parts):
    with shortage.together():
        mine = parts[0][accelerator.process_index :: 2]
        if accelerator.process_index == 1 and any(len(batch) > 1 for batch in mine):
            torch.empty(1 << 60, dtype=torch.uint8)
    return float(accelerator.reduce(torch.tensor(float(sum(map(len, mine)))), "sum"))

class Copy:
    in_the_way = accelerator.process_index == 1
    def give_up(self):
        self.in_the_way = False
        print("packed", end=" ")

shortage.dense = Copy()
parts, found = shortage.fit("update", [[[0, 1, 2, 3], [4, 5, 6, 7]]], [10] * 8, work, weights_unchanged=True)
print(accelerator.process_index, shortage.count, shortage.tokens, found, len(parts[0]))
"""


def test_processes_pack_the_base_and_halve_together_if_one_is_short(tmp_path):
    # Accelerate wants an address although the group is there already.
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path / "meeting")],
            cwd=ROOT,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].split() for process in both]
    assert printed == [["packed", str(rank), "3", "10", "8.0", "8"] for rank in range(2)]


def test_with_a_split_base_the_others_cannot_be_asked():
    lockstep = OomRetry(Accelerator(cpu=True)).together(lockstep=True)
    with pytest.raises(UserError, match=r"memory ran out \(no room\).*FSDP.*training.micro_batch_tokens"), lockstep:
        raise torch.OutOfMemoryError("no room")
