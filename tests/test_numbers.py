"""Numbers that are not finite: the step is skipped, counted and kept, the run goes on or stops with a reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.replay.replay import HERE, replay
from hapo_lite.runs.checkpoint import Checkpoint, TrainState, load_checkpoint, save_checkpoint
from hapo_lite.runs.skipped import KEPT, load_step, save_step
from hapo_lite.train import run
from hapo_lite.train.__main__ import main
from hapo_lite.train.accelerator import LOSS_SCALING, make_accelerator
from hapo_lite.train.collapse import CollapseWatch
from hapo_lite.train.loop import Loop
from hapo_lite.train.observer import Observer
from hapo_lite.train.optimizer import loss_scale, make_learner, take_step
from tests.conftest import TINY


class Keeping(Observer):
    """Saves the steps that are skipped."""

    def __init__(self, loop: Loop, folder, files: list) -> None:
        self.loop = loop
        self.folder = folder
        self.files = files

    def on_skip(self, step):
        self.files.append(save_step(self.folder, step, self.loop.policy.trainable(), self.loop.recipe))


@pytest.fixture
def prepared(make_recipe, make_loop, tmp_path):
    """prepared(overrides...) -> a loop after one iteration, its state, and the files of steps it skips."""

    def make(*overrides: str) -> tuple[Loop, TrainState, list]:
        loop, files = make_loop(make_recipe("logging.traces_per_iteration=2", *overrides)), []
        state, _, _ = loop.step(TrainState())
        loop.watch(Keeping(loop, tmp_path / "replay", files))
        return loop, state, files

    return make


def weights(loop: Loop) -> list[torch.Tensor]:
    return [p.detach().clone() for p in loop.learner.parameters]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Poison:
    """While it lasts, the gradient (or the output) of one layer is nan in the calls that are counted in `calls`."""

    def __init__(self, loop: Loop, calls: set[int], backward: bool) -> None:
        self.name = next(n for n, m in loop.policy.model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
        self.calls, self.backward, self.seen = calls, backward, 0
        self.handle = loop.policy.model.get_submodule(self.name).register_forward_hook(self.hook)

    def hook(self, module, inputs, output):
        if not output.requires_grad:
            return output
        self.seen += 1
        if self.seen not in self.calls:
            return output
        if not self.backward:
            return output * math.nan
        output.register_hook(lambda gradient: gradient * math.inf)
        return output


@pytest.mark.parametrize("backward", [True, False], ids=["gradient", "loss"])
def test_one_bad_step_is_skipped_and_the_others_are_taken(prepared, backward):
    loop, state, files = prepared("training.micro_batch_tokens=100000")
    before, rate = weights(loop), loop.learner.scheduler.get_last_lr()[0]
    poison = Poison(loop, {1}, backward)
    after, metrics, _ = loop.step(state)
    assert metrics["update/skipped"] == 1 and after.updates == state.updates + 1 == metrics["updates"]
    assert after.skipped_in_a_row == 0  # the second was taken
    assert all(math.isfinite(v) for v in metrics.values())
    assert not same(weights(loop), before) and all(bool(w.isfinite().all()) for w in weights(loop))
    assert loop.learner.scheduler.get_last_lr()[0] > rate
    [file] = files
    saved = load_step(file)
    step, adapter, recipe = saved.step, saved.adapter, saved.recipe
    assert file.name == "000002-1.safetensors" and recipe == loop.recipe
    assert ("gradient's norm" if backward else "loss") in step.reason
    assert same((adapter[name] for name in loop.policy.trainable()), before)  # as they were when it happened
    poison.handle.remove()
    assert replay(file) == HERE


@pytest.mark.parametrize("backward", [True, False], ids=["gradient", "loss"])
def test_replay_names_the_layer(prepared, monkeypatch, backward):
    loop, state, files = prepared("training.micro_batch_tokens=100000")
    Poison(loop, {1}, backward)
    loop.step(state)
    load = run.load_policy

    def sick(*arguments, **options):
        policy = load(*arguments, **options)
        sick.poison = Poison(type("L", (), {"policy": policy}), {1}, backward)
        return policy

    monkeypatch.setattr("hapo_lite.replay.replay.load_policy", sick)
    begins = replay(files[0])
    assert begins.startswith("backward, in the gradient of" if backward else "forward, in the output of")
    assert "layers.1.mlp.down_proj" in begins


def test_a_file_calls_the_base_models_log_probabilities_what_it_always_has(prepared):
    """Files of older versions load: the name on the disk is base_logp, for two things."""
    loop, state, files = prepared("method=archer", "training.micro_batch_tokens=100000")
    Poison(loop, {1}, backward=True)
    loop.step(state)
    written, experience = load_file(files[0]), load_step(files[0]).step.experience
    assert torch.equal(torch.cat(experience.reference_logp), written["scored.base_logp"])
    at_base_temperature = torch.cat([c.base_logp for c in experience.completions])
    assert torch.equal(at_base_temperature, written["sampled.base_logp"])
    assert not torch.allclose(written["scored.base_logp"], written["sampled.base_logp"], atol=1e-3)


def test_replay_finds_a_weight_that_is_not_finite(prepared):
    loop, state, files = prepared()
    name = next(iter(loop.policy.trainable()))
    loop.policy.trainable()[name].data[0, 0] = math.nan
    before = weights(loop)
    after, metrics, _ = loop.step(state)
    assert metrics["update/skipped"] == 2 and after.skipped_in_a_row == 1
    assert "is nan" in load_step(files[0]).step.reason
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, weights(loop), strict=True))
    assert replay(files[0]) == f"1 of {before[0].numel()} numbers of the adapter's {name}"


def test_a_reward_that_is_not_finite_costs_the_iteration_and_no_more(prepared):
    loop, state, files = prepared()
    scorer, before = loop.collector.scorer, weights(loop)

    class Once:
        def score(self, *arguments):
            scores = scorer.score(*arguments)
            scores[3] = type(scores[3])(math.inf, False, "wrong", None)
            return scores

    loop.collector.scorer = Once()
    after, metrics, traces = loop.step(state)
    assert same(weights(loop), before) and not traces
    assert (after.iteration, after.updates, after.skipped_in_a_row) == (2, state.updates, 1)
    assert after.cursor > state.cursor and after.signal == state.signal
    assert metrics["update/skipped"] == 2 and all(math.isfinite(v) for v in metrics.values())
    assert "completion 3 of prompt" in replay(files[0]) and "is inf" in replay(files[0])
    loop.collector.scorer = scorer
    after, metrics, _ = loop.step(after)
    assert metrics["update/skipped"] == 0 and after.skipped_in_a_row == 0 and not same(weights(loop), before)


def test_the_run_stops_with_a_reason_after_as_many_as_the_recipe_allows(tmp_path, capsys):
    (tmp_path / "sick.py").write_text(
        "def score(prompts, completions, answers):\n    return [float('nan')] * len(answers)\n"
    )
    arguments = [
        str(TINY),
        f"output_dir={tmp_path}",
        f"reward.function={tmp_path / 'sick.py'}:score",
        "rollout.prompts_per_iteration=2",
        "rollout.completions_per_prompt=2",
        "training.updates_per_iteration=2",
        "training.max_skipped=3",
        "training.iterations=9",
        "evaluation.prompts=0",
        "checkpoint.every=0",
        "data.limit=64",
        "logging.progress=false",
    ]
    assert run_command(main, arguments) == 2
    printed = capsys.readouterr()
    assert "stopped after iteration 3, which is saved: 3 updates, or iterations" in printed.err
    notes = [line for line in printed.out.splitlines() if "skipped: the reward of completion 0 of prompt" in line]
    assert len(notes) == 3
    folder = tmp_path / "tiny_cpu"
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line.get("update/skipped") for line in lines] == [None, 2, 2, 2]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["000003"]
    assert run_command(main, arguments) == 2  # it tries one more
    assert "stopped after iteration 4" in capsys.readouterr().err


def test_no_more_files_than_the_disk_should_hold(prepared, tmp_path):
    loop, state, files = prepared()
    Poison(loop, set(range(1, 100)), backward=True)
    for _ in range(4):
        state, _, _ = loop.step(state)
    assert state.skipped_in_a_row == len(files) == 8
    assert sorted((tmp_path / "replay").iterdir()) == files[-KEPT:]


def test_the_newest_files_are_those_of_the_highest_numbers(prepared, tmp_path):
    loop, state, files = prepared()
    Poison(loop, {1}, backward=True)
    loop.step(state)
    saved = load_step(files[0])
    step, adapter, recipe = saved.step, saved.adapter, saved.recipe
    for number in range(1, 13):
        save_step(tmp_path / "many", replace(step, step=number), adapter, recipe)
    left = {path.stem for path in (tmp_path / "many").iterdir()}
    assert left == {f"{step.iteration:06d}-{number}" for number in range(13 - KEPT, 13)}


def test_a_run_that_had_no_loss_scaling_goes_on_with_it(prepared, tmp_path):
    """As from a card with bf16 to one without."""
    loop, state, _ = prepared()
    path = save_checkpoint(tmp_path, loop.parts, state, loop.recipe)
    loop.learner.optimizer = AcceleratedOptimizer(loop.learner.optimizer.optimizer, scaler=torch.amp.GradScaler("cpu"))
    assert load_checkpoint(Checkpoint.read(path), loop.parts) == state


def test_replay_refuses_what_is_no_step(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        replay(tmp_path / "none.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a skipped step that this program wrote, or is damaged"):
        replay(tmp_path / "other.safetensors")


def test_under_loss_scaling_it_is_the_scaler_that_skips_and_lowers_its_scale(prepared):
    """fp16's scaler, on a CPU: accelerate gives it to its optimiser wrapper in just this way on a GPU."""
    loop, _, _ = prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(loop.learner.optimizer.optimizer, scaler=scaler)
    before = weights(loop)

    def attempt(loss: float, gradient: float) -> tuple[float, str | None]:
        optimizer.zero_grad()
        scaler.scale(torch.zeros(()))  # what accelerator.backward begins with
        for p in loop.learner.parameters:
            p.grad = torch.full_like(p, gradient * loss_scale(optimizer))
        loop.accelerator.clip_grad_norm_ = unscaling(optimizer, scaler)
        return take_step(loop.accelerator, optimizer, loop.learner.parameters, loss, 1.0)

    assert loss_scale(optimizer) == 1024.0
    norm, problem = attempt(0.5, math.inf)
    assert (
        problem == f"its gradient's norm is {norm}" and loss_scale(optimizer) == 512.0 and same(weights(loop), before)
    )
    norm, problem = attempt(math.nan, 1.0)
    assert problem == "its loss is nan" and loss_scale(optimizer) == 256.0 and same(weights(loop), before)
    norm, problem = attempt(0.5, 0.01)
    count = sum(p.numel() for p in loop.learner.parameters)
    assert problem is None and norm == pytest.approx(0.01 * math.sqrt(count), rel=1e-5)
    assert loss_scale(optimizer) == 256.0 and not same(weights(loop), before)


def test_loss_scaling_changes_no_update_and_a_bad_step_is_kept_with_its_scale(prepared):
    """Scaled by a power of two, the gradients are the same to the last bit; log-probabilities and loss stay in fp32."""
    plain, state, _ = prepared()
    loop, _, files = prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop.learner.optimizer = AcceleratedOptimizer(loop.learner.optimizer.optimizer, scaler=scaler)
    loop.accelerator.scaler = scaler
    loop.accelerator.clip_grad_norm_ = unscaling(loop.learner.optimizer, scaler)
    plain.step(state)
    state, metrics, _ = loop.step(state)
    assert metrics["update/skipped"] == 0 and same(weights(loop), weights(plain))
    Poison(loop, {1}, backward=True)
    _, metrics, _ = loop.step(state)
    assert metrics["update/skipped"] == 1 and loss_scale(loop.learner.optimizer) == 512.0
    assert load_step(files[0]).step.loss_scale == 1024.0


def test_a_step_with_nothing_to_learn_is_no_error_under_loss_scaling(make_recipe, make_loop):
    """Without a loss of this process accelerator.backward, which makes the scaler's scale, is never called."""
    loop = make_loop(make_recipe("logging.traces_per_iteration=0"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop.accelerator.prepare = lambda optimizer: AcceleratedOptimizer(optimizer, scaler=scaler)
    loop.learner = make_learner(loop.recipe.training, loop.policy, loop.accelerator)
    loop.accelerator.clip_grad_norm_ = unscaling(loop.learner.optimizer, scaler)
    loop.active = lambda advantage, traced: set()
    before = weights(loop)
    _, metrics, _ = loop.step(TrainState())
    assert metrics["update/skipped"] == 0 == metrics["update/grad_norm"] and same(weights(loop), before)


def test_early_overflows_end_no_run_and_the_scale_recovers(make_recipe):
    """A gradient of 4,000 overflows in fp16 above a scale of 16."""
    recipe = make_recipe()
    assert make_accelerator(recipe).scaler_handler is LOSS_SCALING
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", **LOSS_SCALING.to_kwargs())

    def skipped(gradient: float) -> bool:
        scaler.scale(torch.zeros(()))
        before = scaler.get_scale()
        parameter.grad = torch.tensor([gradient * before], dtype=torch.float16).float()
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale() < before

    in_a_row = 0
    while skipped(4000.0):
        in_a_row += 1
    assert 0 < in_a_row < recipe.training.max_skipped
    assert scaler.get_scale() == 16.0 and not any(skipped(1.0) for _ in range(800)) and scaler.get_scale() >= 2048.0


def unscaling(optimizer, scaler):
    """accelerate's clip_grad_norm_ under fp16: unscale, then clip."""

    def clip(parameters, max_norm):
        scaler.unscale_(optimizer.optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    return clip


def line(iteration: int, entropy: float = 0.5, length: float = 40.0, correct: float = 0.3) -> dict[str, float]:
    return {"iteration": iteration, "entropy/all_mean": entropy, "length/mean": length, "reward/correct_share": correct}


def test_collapse_is_said_once_as_it_starts():
    entropies = [0.5, 0.6, 0.4, 0.3, 0.09, 0.3, 0.09, 0.08, 0.07, 0.01, 0.5, 0.01, 0.01, 0.01]
    watch, said = CollapseWatch(), []
    for iteration, entropy in enumerate(entropies, 1):
        said += watch.see(line(iteration, entropy))
    # A fifth of 0.5; once below is noise, three times in a row is a collapse.
    assert len(said) == 1 and said[0].startswith("iteration 9: entropy is collapsing, from 0.5 to 0.07 nats")
    watch, said = CollapseWatch(), []
    for iteration, length in enumerate([40, 40, 40, 30, 19, 18, 17, 16], 1):
        said += watch.see(line(iteration, length=length))
    assert len(said) == 1 and said[0].startswith("iteration 7: completions are getting short, from 40 to 17 tokens")


def test_iterations_without_a_group_are_no_collapse():
    watch = CollapseWatch()
    for iteration in range(1, 12):
        empty = {"iteration": iteration, "length/mean": 0.0, "reward/correct_share": 0.0}
        assert not watch.see(empty if iteration > 4 else line(iteration))


def test_what_is_solved_may_be_short_and_certain():
    watch = CollapseWatch()
    for iteration in range(1, 20):
        late = iteration > 5
        assert not watch.see(line(iteration, 0.01 if late else 0.5, 10 if late else 40, 0.95 if late else 0.3))
