"""Whole runs through the command line: what they leave, how they resume, what they say when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hapo_lite.cli import run_command
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.runs.checkpoint import read_record
from hapo_lite.runs.lines import MetricsFile, timeless
from hapo_lite.runs.status import read_status
from hapo_lite.runs.trace import read_traces
from hapo_lite.train.__main__ import main
from hapo_lite.verify_resume.verify import left_by
from tests.commands import ENVIRONMENT, RUN_FILES, SMALL, own_precision
from tests.conftest import ROOT, TINY


def command(folder: Path, *overrides: str, recipe: Path | str = TINY, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [*launcher] if launcher else [sys.executable]
    return [*start, "-m", "hapo_lite.train", str(recipe), f"output_dir={folder}", *SMALL, *overrides]


def train(folder: Path, *overrides: str, **options) -> subprocess.CompletedProcess:
    cwd = options.pop("cwd", ROOT)
    return subprocess.run(
        command(folder, *overrides, **options), capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=240
    )


def train_here(folder: Path, *overrides: str) -> int:
    """The exit code of the same command in this process, which has imported torch already."""
    return run_command(main, command(folder, *overrides)[3:])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run of six iterations, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder / "tiny_cpu", done.stdout


def test_a_run_leaves_everything_it_promises(finished):
    run, printed = finished
    assert {p.name for p in run.iterdir()} == RUN_FILES
    lines = MetricsFile(run / "metrics.jsonl").read()
    assert [line["iteration"] for line in lines] == list(range(7))
    assert [line["iteration"] for line in lines if "eval/accuracy" in line] == [0, 3, 6]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["000004", "000006"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 6 and summary["updates"] == 12
    assert summary["evaluation"]["after"]["eval/accuracy"] == lines[-1]["eval/accuracy"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"held-out accuracy, avg@2 +0\.\d+ +0\.\d+", printed)
    for path in (run / "traces").iterdir():
        traces = read_traces(path)
        assert traces and all(t.iteration == int(path.stem) for t in traces)
    assert {t.stage for t in read_traces(run / "traces" / "000003.jsonl")} == {"train", "eval"}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["training"]["iterations"] == 6 and recipe["method"]["tau"] == 0.05
    doing = read_status(run / "status.json")
    assert doing.stage == "finished" and doing.iteration == 6
    assert {doing.entered[stage] for stage in ("rollout", "scoring", "update")} == {6}
    assert doing.entered["evaluation"] == 3 and doing.entered["checkpoint"] == 3


def test_every_metric_is_defined(finished):
    text = (ROOT / "docs" / "metrics.md").read_text()
    defined, sometimes = set(), set()
    for cell, rest in re.findall(r"^\| (`[^|]*) \|(.*)", text, flags=re.MULTILINE):
        first = ""
        for name in re.findall(r"`([^`]+)`", cell):
            # `reward/mean`, `/std` and `entropy/all_mean`, `_q20` are short for the group of the first.
            if name.startswith("/"):
                name = first.rsplit("/", 1)[0] + name
            elif name.startswith("_"):
                name = first.rsplit("_", 1)[0] + name
            else:
                first = name
            defined.add(name)
            if "| only with" in rest:
                sometimes.add(name)
    patterns = [re.compile(re.escape(name).replace(r"\*", ".*")) for name in defined]
    measured = {key for line in MetricsFile(finished[0] / "metrics.jsonl").read() for key in line}
    assert not {key for key in measured if not any(p.fullmatch(key) for p in patterns)}
    always = {name for name in defined - sometimes if "*" not in name}
    assert not always - measured


def test_the_adapter_loads_with_plain_peft_and_is_the_one_that_was_trained(finished):
    run, _ = finished
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "adapter")
    saved = load_file(run / "checkpoints" / "000006" / "adapter_model.safetensors")
    loaded = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[k], saved[k]) for k in saved)
    assert any(v.any() for k, v in saved.items() if "lora_B" in k)


def test_the_same_command_twice_gives_the_same_bytes(finished, tmp_path):
    """In a process of its own and in this one, in which other tests have run."""
    assert train_here(tmp_path) == 0
    assert left_by(tmp_path) == left_by(finished[0].parent)


def signal_at(folder: Path, lines: int, number: int) -> int:
    """Send a signal once metrics.jsonl has so many lines, and return the exit code."""
    process = subprocess.Popen(
        command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=ROOT
    )
    metrics = folder / "tiny_cpu" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines):
        time.sleep(0.002)
    process.send_signal(number)
    print(process.communicate(timeout=120)[1].decode())  # shown if the test fails
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_continues(finished, tmp_path, capsys, number):
    code = signal_at(tmp_path, 2, number)
    run = tmp_path / "tiny_cpu"
    assert code == 128 + number
    done = len(MetricsFile(run / "metrics.jsonl").read()) - 1
    assert 0 < done < 6
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name == f"{done:06d}"  # nothing that was finished is lost
    if number == signal.SIGINT:
        assert train_here(tmp_path) == 0 and f"after iteration {done}" in capsys.readouterr().out
        assert left_by(run.parent) == left_by(finished[0].parent)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "tiny_cpu")
    weights = tmp_path / "tiny_cpu" / "checkpoints" / "000006" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert train_here(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "000006 is damaged: adapter_model.safetensors has changed" in printed
    assert "after iteration 4" in printed
    read_record(weights.parent)  # it has been written anew
    assert left_by(tmp_path) == left_by(finished[0].parent)


def test_a_finished_run_is_left_alone_and_may_be_prolonged(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "tiny_cpu")
    assert train_here(tmp_path) == 0
    assert left_by(tmp_path) == left_by(finished[0].parent)
    assert train_here(tmp_path, "training.iterations=7") == 0
    lines = MetricsFile(tmp_path / "tiny_cpu" / "metrics.jsonl").read()
    assert [line["iteration"] for line in lines] == list(range(8))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0.5", "was made with training.learning_rate = 0.0005, the recipe now says 0.5"),
        ("checkpoint.resume=never", "holds a run already"),
    ],
)
def test_another_recipe_does_not_continue_the_run(finished, tmp_path, capsys, override, message):
    shutil.copytree(finished[0], tmp_path / "tiny_cpu")
    assert train_here(tmp_path, override) == 2
    said = capsys.readouterr().err
    # Found before the model is loaded, not with the checkpoints.
    assert message in said and "choose another name=" in said
    assert left_by(tmp_path) == left_by(finished[0].parent)


def accelerate(name: str) -> tuple[str, ...]:
    """The start of a command that runs on the processes of recipes/accelerate/NAME.yaml, at a free port."""
    config = str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")
    return sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"


def adapter_distance(run: Path, other: Path) -> float:
    """How far one run's adapter is from another's, as a share of what the first has learned: LoRA's B begins at 0."""
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, other))
    assert left.keys() == right.keys()
    squares = [((left[k] - right[k]).square().sum(), left[k].square().sum()) for k in left if "lora_B" in k]
    distance, length = (float(sum(part).sqrt()) for part in zip(*squares, strict=True))
    return distance / length


@pytest.mark.slow
def test_two_processes_learn_what_one_does(finished, tmp_path):
    """The signal, the groups and the denominator are global: two CPU processes give the loss curve of one."""
    done = train(tmp_path, launcher=accelerate("ddp"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "tiny_cpu" / "summary.json").read_text())["machine"]["processes"] == 2
    one = MetricsFile(finished[0] / "metrics.jsonl").read()
    assert_same_curve(one, MetricsFile(tmp_path / "tiny_cpu" / "metrics.jsonl").read())
    assert adapter_distance(finished[0], tmp_path / "tiny_cpu") < 1e-5


@pytest.mark.slow
def test_with_the_base_split_they_learn_the_same(finished, tmp_path):
    """Layers of NF4 in two parts, and micro-batches that do not come out even: FSDP changes memory and nothing else."""
    done = train(
        tmp_path,
        "training.micro_batch_tokens=160",
        "training.iterations=3",
        "evaluation.prompts=0",
        launcher=accelerate("fsdp"),
    )
    assert done.returncode == 0, done.stderr
    sizes = re.search(r"FSDP: (\S+) MB of the weights in each process, (\S+) MB", done.stdout)
    part, whole = map(float, sizes.groups())
    assert part < 0.8 * whole  # of the bundled model, nearly half is embedding and norms, which stay whole
    one = MetricsFile(finished[0] / "metrics.jsonl").read()[1:4]
    learned = [{key: value for key, value in line.items() if not key.startswith("eval/")} for line in one]
    assert_same_curve(learned, MetricsFile(tmp_path / "tiny_cpu" / "metrics.jsonl").read()[1:])


SHARES_AT_A_BOUND = ("clip/", "credit/amplified_share", "credit/suppressed_share", "signal/above_share")
"""Shares of tokens on one side of a bound: the last bit of a product may carry a token across it."""


def assert_same_curve(one: list[dict], two: list[dict]) -> None:
    """Two runs whose sums are made in another order sample the same tokens and learn the same from them."""
    for left, right in zip(one, two, strict=True):
        assert timeless(left).keys() == timeless(right).keys()
        for key, value in timeless(left).items():
            if key.startswith(SHARES_AT_A_BOUND):
                continue
            assert right[key] == pytest.approx(value, abs=1e-5, rel=1e-4), (left["iteration"], key)


QWEN_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the maths data sets are not beside the checkout")
def test_the_path_of_a_gpu_user(tmp_path, monkeypatch):
    """recipes/qwen1_5b_lora.yaml on a small model of Qwen's shape and vocabulary, with GSM8K, in 4-bit."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**QWEN_SHAPE)).save_pretrained(tmp_path / "qwen")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "qwen")
    arguments = [
        str(ROOT / "recipes" / "qwen1_5b_lora.yaml"),
        f"output_dir={tmp_path}",
        f"model.name={tmp_path / 'qwen'}",
        f"data.source={SHARED / 'gsm8k_train.parquet'}",
        "training.iterations=2",
        "rollout.prompts_per_iteration=2",
        "rollout.completions_per_prompt=2",
        "rollout.max_new_tokens=12",
        "rollout.token_budget=null",
        "rollout.dynamic_sampling=false",
        "reward.function=tests.rewards:every_other",
        "evaluation.prompts=2",
        "evaluation.samples=2",
    ]
    monkeypatch.chdir(ROOT)
    with own_precision():
        assert run_command(main, arguments) == 0
    lines = MetricsFile(tmp_path / "qwen1_5b_lora" / "metrics.jsonl").read()
    assert len(lines) == 3 and lines[-1]["updates"] == 8
    assert lines[-1]["entropy/all_mean"] > 5  # a random model over 152k tokens
    adapter = load_file(tmp_path / "qwen1_5b_lora" / "adapter" / "adapter_model.safetensors")
    assert all(v.any() for v in adapter.values())
