"""The supervised warm start: its loss and gradient beside plain ones, what it leaves, resumption, refusals."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.export.export import export
from hapo_lite.model.load import load_policy
from hapo_lite.model.template import templated
from hapo_lite.recipe import first_incompatible_setting
from hapo_lite.rollout.engine import make_engine
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.files import file_hash
from hapo_lite.runs.interrupt import Interrupted
from hapo_lite.runs.lines import MetricsFile
from hapo_lite.runs.progress import Progress
from hapo_lite.sft.__main__ import main
from hapo_lite.sft.loop import WarmLoop
from hapo_lite.sft.recipe import WarmRecipe
from hapo_lite.sft.run import WarmRun, sft
from hapo_lite.sft.solutions import worked_prompts
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.train import run
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collector
from hapo_lite.train.prompts import load_data
from hapo_lite.verify_resume.__main__ import main as verify_resume
from hapo_lite.verify_resume.verify import left_by
from tests.commands import RUN_FILES
from tests.conftest import ROOT, TINY, noisy_adapter
from tests.loops import adapter_digest
from tests.rows import jsonl

SMALL = ["data.limit=120", "sft.batch_size=8", "rollout.max_new_tokens=48", "sft.held_out=0.05"]


def silent(sentence: str) -> None:
    pass


@pytest.fixture
def make_warm(make_recipe):
    """make_warm("section.key=value", ...): the moving parts of a warm start; graders are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*overrides: str) -> WarmLoop:
            recipe = WarmRecipe.of(make_recipe(*SMALL, "model.quantization=none", *overrides))
            accelerator = make_accelerator(recipe)
            policy = load_policy(recipe.model, recipe.seed, accelerator.device)
            data = load_data(recipe.data, recipe.evaluation, recipe.seed, silent, solutions=True)
            prompts = worked_prompts(data.training, policy, recipe, Progress(), silent)
            scorer = stack.enter_context(Scorer(recipe.reward, recipe.rollout.max_new_tokens))
            return WarmLoop(recipe, policy, Collector(make_engine(recipe, policy), scorer, accelerator), prompts)

        yield make


def solutions_of(loop: WarmLoop, count: int):
    return [loop.encoder.solution(prompt) for prompt in loop.stream.take(0, count)]


def plain_loss(policy, solutions) -> torch.Tensor:
    """The mean cross entropy as transformers and torch compute it, one sequence at a time, labels written by hand."""
    total, tokens = torch.zeros(()), 0
    for solution in solutions:
        prompt = torch.tensor(solution.prompt.ids)
        ids = torch.cat([prompt, solution.ids])
        labels = torch.cat([torch.full_like(prompt, -100), solution.ids])
        logits = policy.model(input_ids=ids[None]).logits[0]
        total = total + functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum", ignore_index=-100)
        tokens += len(solution.ids)
    return total / tokens


def gradients_of(policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.trainable().items()}


def test_loss_and_gradient_are_those_of_a_plain_cross_entropy(make_warm):
    loop = make_warm("training.micro_batch_tokens=128")
    solutions = solutions_of(loop, 8)
    assert len({solution.length for solution in solutions}) > 1
    with noisy_adapter(loop.policy, 0.05, seed=1):  # with B = 0 the gradient of A would be 0
        loss, ours = loop.gradients(solutions), gradients_of(loop.policy)
        loop.policy.model.zero_grad()
        expected = plain_loss(loop.policy, solutions)
        expected.backward()
        theirs = gradients_of(loop.policy)
    assert loss == pytest.approx(expected.item(), abs=1e-5) and loss > 0.1
    for name, gradient in theirs.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_the_same_for_any_micro_batch(make_warm):
    found = []
    for budget in (32, 200, 10_000):
        loop = make_warm(f"training.micro_batch_tokens={budget}")
        with noisy_adapter(loop.policy, 0.05, seed=1):
            found.append((loop.gradients(solutions_of(loop, 8)), gradients_of(loop.policy)))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-6)


def test_the_held_out_loss_is_the_mean_over_all_tokens(make_warm):
    loop = make_warm("training.micro_batch_tokens=128")
    assert len(loop.kept) == 6
    with torch.no_grad():
        assert loop.kept_loss() == pytest.approx(float(plain_loss(loop.policy, loop.kept)), abs=1e-5)
    assert loop.evaluate(1).metrics["sft/held_out_loss"] == loop.kept_loss()


def test_the_tokens_are_those_of_the_chat_template_with_the_end_of_the_turn(make_warm):
    loop = make_warm()
    for solution in solutions_of(loop, 8):
        prompt = solution.prompt.prompt
        chat = [*prompt.chat(), {"role": "assistant", "content": prompt.solution}]
        whole = loop.policy.tokenizer.encode(templated(loop.policy.tokenizer, chat), add_special_tokens=False)
        ids = [*solution.prompt.ids, *solution.ids.tolist()]
        assert whole[: len(ids)] == ids and ids[-1] in loop.policy.stop_ids
        assert loop.policy.tokenizer.decode(whole[len(ids) :]).strip() == ""


def test_an_epoch_takes_every_solution_once(make_warm):
    loop = make_warm("sft.epochs=2")
    solutions = len(loop.stream.prompts)
    assert solutions == 114 and loop.recipe.training.iterations == 29  # 2 x 114 / 8, rounded up
    first = [prompt.prompt.id for prompt in loop.stream.take(0, solutions)]
    assert len(set(first)) == solutions and not {s.prompt.prompt.id for s in loop.kept} & set(first)
    state, _, _ = loop.step(TrainState())
    assert state.cursor == 8 and state.tokens == sum(s.length for s in solutions_of(loop, 8))


def test_the_schedule_and_the_rate_are_those_of_the_warm_start(make_warm):
    loop = make_warm("sft.learning_rate=0.01", "sft.warmup_updates=2", "sft.updates=6", "training.learning_rate=1e-9")
    state, rates = TrainState(), []
    for _ in range(6):
        state, metrics, _ = loop.step(state)
        rates.append(metrics["update/learning_rate"])
    # Up in two steps, then down in a line to 0 after the sixth.
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_a_loss_that_is_not_finite_is_skipped_and_many_stop_the_run(make_warm, make_recipe, monkeypatch):
    loop = make_warm()
    before, notes = adapter_digest(loop), []
    monkeypatch.setattr(loop.observer, "on_note", notes.append)
    monkeypatch.setattr(WarmLoop, "total_loss", lambda self, solutions: next(iter(self.learner.parameters)).sum() / 0)
    state, metrics, _ = loop.step(TrainState())
    assert metrics["update/skipped"] == 1 and state.updates == 0 and adapter_digest(loop) == before
    assert notes == [f"update 1 skipped: its loss is {metrics['sft/loss']}"]
    recipe = make_recipe(*SMALL, "training.max_skipped=2", "sft.held_out=0")
    with pytest.raises(UserError, match=r"stopped after update 2, which is saved: 2 updates were skipped in a row"):
        sft(recipe)


def test_the_held_out_prompts_are_those_of_the_run_that_follows(make_recipe, tmp_path):
    rows = [{"problem": f"{i}+1=?", "answer": str(i + 1), "solution": f"So it is {i + 1}."} for i in range(50)]
    for row in rows[::3]:
        del row["solution"]
    recipe = make_recipe(f"data.source={jsonl(tmp_path, *rows)}", "evaluation.prompts=10")
    plain = load_data(recipe.data, recipe.evaluation, 0, silent)
    worked = load_data(recipe.data, recipe.evaluation, 0, silent, solutions=True)
    assert [p.id for p in plain.held_out] == [p.id for p in worked.held_out]
    assert [p.id for p in plain.training] == [p.id for p in worked.training]
    assert not any(p.solution for p in plain.training) and sum(bool(p.solution) for p in worked.training) > 20


# ------------------------------------------------------------------------------------------------- whole warm starts


def command(folder: Path, *overrides: str) -> list[str]:
    settings = ["evaluation.prompts=8", "evaluation.samples=2", "evaluation.every=2", "reward.workers=1"]
    length = ["sft.updates=5", "sft.learning_rate=1e-3", "sft.warmup_updates=1", "checkpoint.every=2"]
    return [str(TINY), f"output_dir={folder}", "logging.progress=false", *SMALL, *settings, *length, *overrides]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    assert run_command(main, command(folder)) == 0
    return folder / "tiny_cpu-sft"


def test_a_warm_start_leaves_a_run_folder(finished):
    assert {p.name for p in finished.iterdir()} == RUN_FILES
    lines = MetricsFile(finished / "metrics.jsonl").read()
    assert [line["iteration"] for line in lines] == list(range(6))
    assert [line["iteration"] for line in lines if "sft/held_out_loss" in line] == [0, 2, 4, 5]
    assert [line["iteration"] for line in lines if "eval/accuracy" in line] == [0, 5]
    summary = json.loads((finished / "summary.json").read_text())
    losses = summary["held_out_loss"]
    assert losses == {"before": lines[0]["sft/held_out_loss"], "after": lines[-1]["sft/held_out_loss"]}
    assert losses["after"] < losses["before"]
    accuracy = summary["accuracy"]["after"]
    assert accuracy["low"] <= accuracy["value"] == lines[-1]["eval/accuracy"] <= accuracy["high"]
    assert summary["updates"] == 5 and summary["method"] == "sft" and summary["minutes"]["training"] >= 0
    assert summary["adapter_sha256"] == file_hash(finished / "adapter" / "adapter_model.safetensors")


def test_every_number_of_a_warm_start_is_defined(finished):
    text = "".join((ROOT / "docs" / page).read_text() for page in ("sft.md", "metrics.md"))
    defined = set(re.findall(r"`([\w/]+)`", text)) | {"eval/length_mean"}
    assert {key for line in MetricsFile(finished / "metrics.jsonl").read() for key in line} - defined == set()


def test_training_goes_on_from_the_warm_start(finished, make_recipe, capsys):
    digest = file_hash(finished / "adapter" / "adapter_model.safetensors")
    run.train(make_recipe(f"model.adapter={finished}", "training.iterations=1", "data.limit=64"))
    assert f"going on from the adapter {finished}, sha256 {digest}" in capsys.readouterr().out


def test_its_card_says_what_it_was_trained_on(finished, tmp_path):
    export(finished, "adapter", output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    tokens = json.loads((finished / "summary.json").read_text())["trained_tokens"]
    assert "with sft by hapo_lite" in card and f"5 updates, {tokens:,} tokens of worked solutions" in card
    assert "reinforcement-learning" not in card.split("---")[1]


def test_its_recipe_repeats_it_and_a_finished_one_only_reports(finished, tmp_path, capsys):
    assert run_command(main, [str(finished / "recipe.yaml"), f"output_dir={tmp_path}"]) == 0
    assert left_by(tmp_path) == left_by(finished.parent)
    printed = capsys.readouterr().out
    assert re.search(r"held-out loss, nats a token +0\.\d+ +0\.\d+", printed) and "its solution, " in printed
    assert run_command(main, [str(finished / "recipe.yaml"), "method=dapo", "training.learning_rate=1"]) == 0


@pytest.mark.parametrize("at", [1, 3])
def test_it_resumes_to_the_same_bytes(finished, tmp_path, monkeypatch, capsys, at):
    step = WarmLoop.step

    def stop(loop, state):
        if state.iteration == at:
            raise Interrupted(15)
        return step(loop, state)

    with monkeypatch.context() as patched:
        patched.setattr(WarmLoop, "step", stop)
        assert run_command(main, command(tmp_path)) == 128 + 15
    # The iterations of the run that follows say nothing about the warm start's.
    assert run_command(main, [*command(tmp_path), "training.iterations=1"]) == 0
    assert "nothing is left to do" not in capsys.readouterr().out
    assert left_by(tmp_path) == left_by(finished.parent)


@pytest.mark.slow
def test_it_resumes_to_the_same_bytes_after_kill_9(capsys):
    settings = [arg for arg in command(Path("unused")) if not arg.startswith("output_dir")]
    verify_resume([*settings, "--command", "sft", "--kills", "2"])
    assert re.search(r"adapters +\d+ +0", capsys.readouterr().out)


def test_a_setting_that_it_reads_makes_another_run(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / finished.name)
    assert run_command(main, command(tmp_path, "sft.learning_rate=1e-4")) == 2
    assert "was made with sft.learning_rate = 0.001, the recipe now says 0.0001" in capsys.readouterr().err


def test_each_command_ignores_what_the_other_reads(make_recipe):
    before = make_recipe().model_dump(mode="json")
    warm, cold = make_recipe("sft.epochs=3", "data.solution_column=x"), make_recipe("method=dapo")
    assert first_incompatible_setting(before, warm) is None
    assert "data.solution_column" in first_incompatible_setting(before, WarmRecipe.of(warm))
    for truncation in ("top_p=0.9", "top_k=5", "min_p=0.1"):
        cut = make_recipe(f"rollout.{truncation}", "method.importance=truncated")
        assert f"rollout.{truncation.split('=')[0]}" in first_incompatible_setting(before, cut)
        assert first_incompatible_setting(before, WarmRecipe.of(cut)) is None
    longer = WarmRecipe.of(make_recipe("sft.epochs=3"))
    assert first_incompatible_setting(before, longer) == "sft.epochs = 1.0, the recipe now says 3.0"
    assert "method" in first_incompatible_setting(before, cold)
    assert first_incompatible_setting(before, WarmRecipe.of(cold)) is None
    assert "training.weight_decay" in first_incompatible_setting(
        before, WarmRecipe.of(make_recipe("training.weight_decay=1"))
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["sft.max_solution_tokens=15"],
            r"can be trained on \(solution longer than sft\.max_solution_tokens = 15 tokens: 120; the shortest has "
            r"\d+ \+ \d+ tokens\): raise sft\.max_solution_tokens",
        ),
        (["rollout.max_new_tokens=8"], r"solution longer than rollout\.max_new_tokens = 8 tokens"),
        (["data.max_prompt_tokens=4"], r"prompt longer than data\.max_prompt_tokens = 4: 120"),
        (["data.limit=1"], r"sft\.held_out = 0\.05 of 1 worked solutions leaves none to train on"),
        (
            ["data.solution_column=answer"],
            r"has no worked solutions in column 'answer', .*: set data\.solution_column to another of problem, answer",
        ),
        (["data.solution_column=steps"], r"has no column 'steps' \(data\.solution_column\); it has problem, answer"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_a_sentence(make_recipe, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        sft(make_recipe(*SMALL, *overrides))


def test_the_run_of_a_warm_start_has_no_advice_about_reinforcement_learning(make_recipe):
    recipe = WarmRecipe.of(make_recipe("training.updates_per_iteration=1"))
    assert recipe.advice() and WarmRun(recipe, None, None, None, False).advice() == []
