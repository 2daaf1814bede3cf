"""Runs as people have them: a schedule that is stretched, a folder named wandb, an evaluation too early."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hapo_lite import errors
from hapo_lite.cli import run_command
from hapo_lite.errors import UserError, page
from hapo_lite.evaluate.__main__ import main as evaluate
from hapo_lite.rollout.canary import Canary, Distance, _advice, _cause
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.runs.interrupt import Interrupted, Interrupts
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.train.__main__ import main as train
from hapo_lite.train.accelerator import make_accelerator, stop_if_asked
from hapo_lite.train.loop import Loop
from hapo_lite.train.recorder import Recorder
from hapo_lite.train.scoring import Scoring
from hapo_lite.train.update import Update
from tests.commands import ENVIRONMENT
from tests.conftest import ROOT, TINY
from tests.test_run import train_here


def test_a_schedule_that_is_stretched_on_resume_is_said_with_the_rates(tmp_path, capsys):
    linear = ("training.schedule=linear", "training.warmup_updates=0", "evaluation.prompts=0")
    assert train_here(tmp_path, *linear, "training.iterations=2") == 0
    capsys.readouterr()
    assert train_here(tmp_path, *linear, "training.iterations=4", "logging.progress=false") == 0
    printed = capsys.readouterr().out
    assert "note: training.iterations was 2 and is 4, over which training.schedule = linear falls" in printed
    assert "goes from 0.00e+00 to 2.50e-04; training.iterations=2 keeps it" in printed


def test_a_constant_rate_does_not_jump(tmp_path, capsys):
    constant = ("training.warmup_updates=0", "evaluation.prompts=0")
    assert train_here(tmp_path, *constant, "training.iterations=1") == 0
    assert train_here(tmp_path, *constant, "training.iterations=2") == 0
    assert "learning rate goes" not in capsys.readouterr().out


def test_an_evaluation_of_an_unfinished_run_names_its_checkpoint(tmp_path, capsys):
    assert train_here(tmp_path, "training.iterations=2", "evaluation.prompts=0") == 0
    run = tmp_path / "tiny_cpu"
    for path in sorted((run / "adapter").iterdir()):
        path.unlink()
    (run / "adapter").rmdir()
    small = ["benchmark.limit=1", "benchmark.samples=1", "benchmark.max_new_tokens=2", "--suite", "tiny"]
    assert run_command(evaluate, [str(TINY), f"output_dir={tmp_path}", *small, "reward.workers=1"]) == 0
    checkpoint = run / "checkpoints" / "000002"
    assert f"tiny alone, since the run is not finished (--adapter {checkpoint} evaluates" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_named_in_the_first_line(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("name: mine\n")
    small = ["benchmark.limit=1", "benchmark.samples=1", "benchmark.max_new_tokens=2", "--suite", "tiny"]
    for name, hint in (("mine2", " (did you mean name=mine?)"), ("another", "")):
        assert run_command(evaluate, [str(TINY), f"output_dir={tmp_path}", f"name={name}", *small]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(
            f"{name}: there is no run in {tmp_path / name}{hint}, so tiny alone on tiny; 1 sample at"
        )


def test_a_folder_named_wandb_is_no_tracker(make_recipe, tmp_path, monkeypatch):
    if "wandb" in importlib.metadata.packages_distributions():
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UserError, match="pip install wandb"):
        make_accelerator(make_recipe("logging.report_to=wandb"))


def test_loading_a_policy_from_python_prints_nothing_that_reads_like_an_error():
    script = "from hapo_lite import load_policy, load_recipe; load_policy(load_recipe('tiny_cpu').model, 0, 'cpu')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "Failed to load" not in done.stderr and "kernels" not in done.stderr


@pytest.mark.parametrize(("engine", "blamed"), [("transformers", "the trainer computes"), ("vllm", "its base, or its")])
def test_the_engine_check_neither_advises_nor_blames_the_engine_that_is_the_trainers_model(engine, blamed):
    wrong = Distance(engine=9.0, steps=9.0, floor=1e-6, rounded=1e-6)
    assert blamed in _cause(Canary(wrong, wrong, 1.0, 0.0), engine)
    assert ("use rollout.engine=transformers" in _advice(engine)) == (engine != "transformers")


def test_an_error_cites_a_page_that_is_there(tmp_path, monkeypatch):
    assert (ROOT / page("security.md")).is_file()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "hapo_lite" / "errors.py"))  # as a wheel lies there
    assert page("security.md") == str(tmp_path / "hapo_lite" / "docs" / "security.md")
    in_code = [path for path in (ROOT / "hapo_lite").rglob("*.py") if "(docs/" in path.read_text(encoding="utf-8")]
    cited = {name for path in in_code for name in re.findall(r"\(docs/([\w.]+)\)", path.read_text(encoding="utf-8"))}
    assert all((ROOT / "docs" / name).is_file() for name in cited)


SHORT = [
    "rollout.prompts_per_iteration=4",
    "rollout.completions_per_prompt=4",
    "rollout.max_new_tokens=24",
    "training.updates_per_iteration=2",
    "training.iterations=2",
    "evaluation.prompts=0",
    "checkpoint.every=0",
    "data.limit=64",
    "logging.progress=false",
]


@pytest.mark.parametrize(
    ("stage", "error", "saved"),
    [
        ("rollout", UserError("amiss"), ["000001"]),
        ("grading", RuntimeError("amiss"), ["000001"]),
        ("scoring", UserError("amiss"), ["000001"]),
        ("first update", UserError("amiss"), ["000001"]),
        ("second update", UserError("amiss"), []),
    ],
)
def test_an_error_ends_the_run_with_what_was_complete_saved(tmp_path, monkeypatch, capsys, stage, error, saved):
    """Whatever the error, unless the weights have moved on."""
    place = {
        "rollout": (TransformersEngine, "sample"),
        "grading": (Scorer, "score"),
        "scoring": (Scoring, "score"),
        "first update": (Update, "gradients"),
        "second update": (Update, "gradients"),
    }[stage]
    original, calls = getattr(*place), [0]
    # The check before training samples twice.
    allowed = {"rollout": 3, "first update": 2, "second update": 3}.get(stage, 1)

    def failing(*arguments, **options):
        calls[0] += 1
        if calls[0] > allowed:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(*place, failing)
    arguments = [str(TINY), f"output_dir={tmp_path}", *SHORT]
    with contextlib.suppress(RuntimeError):
        run_command(train, arguments)
    checkpoints = tmp_path / "tiny_cpu" / "checkpoints"
    assert [path.name for path in checkpoints.glob("*")] == saved
    printed = capsys.readouterr()
    assert ("note: the run is saved up to iteration 1" in printed.out) == bool(saved)
    monkeypatch.undo()
    if stage == "first update":
        assert run_command(train, arguments) == 0 and "after iteration 1" in capsys.readouterr().out


@pytest.mark.parametrize(("stage", "newest"), [(Scoring, "000001"), (Recorder, "000002")])
def test_processes_that_only_note_a_signal_ask_before_the_first_update(tmp_path, monkeypatch, stage, newest):
    """The launcher of several processes waits 30 s, in which update, evaluation and checkpoint may not end."""
    method, calls = {Scoring: "score", Recorder: "record"}[stage], [0]
    original = getattr(stage, method)

    def signalled(*arguments, **options):
        calls[0] += 1
        if calls[0] == {Scoring: 2, Recorder: 3}[stage]:  # in the second iteration; iteration 0 is recorded too
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(stage, method, signalled)
    monkeypatch.setattr("hapo_lite.train.run.Interrupts", lambda deferred: Interrupts(deferred=True))
    arguments = [str(TINY), f"output_dir={tmp_path}", *SHORT, "training.iterations=3"]
    assert run_command(train, arguments) == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "tiny_cpu" / "checkpoints").iterdir()] == [newest]


@pytest.mark.parametrize("asked", [True, False])
def test_one_process_with_a_signal_stops_all(asked):
    """In a process that has none itself."""

    def reduce(flag, kind):
        return flag + asked

    accelerator, interrupts = SimpleNamespace(num_processes=2, device="cpu", reduce=reduce), Interrupts(deferred=True)
    with pytest.raises(Interrupted) if asked else contextlib.nullcontext():
        stop_if_asked(accelerator, interrupts)


def test_an_error_is_told_although_the_run_cannot_be_saved(tmp_path, monkeypatch, capsys):
    def fails(sentence):
        def failing(*arguments, **options):
            raise UserError(sentence)

        return failing

    original = Loop.step
    monkeypatch.setattr("hapo_lite.train.recorder.save_checkpoint", fails("the disk is full"))
    steps = (original, fails("amiss"))
    monkeypatch.setattr(Loop, "step", lambda loop, state: steps[state.iteration](loop, state))
    assert run_command(train, [str(TINY), f"output_dir={tmp_path}", *SHORT]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: amiss\n" and "note: iteration 1 is not saved: the disk is full" in printed.out
