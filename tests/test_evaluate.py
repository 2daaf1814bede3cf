"""python -m hapo_lite.evaluate: its numbers, its verdicts, and that being killed changes no byte of what it leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.evaluate import __main__ as evaluate
from hapo_lite.evaluate.samples import Sample, SampleFile
from hapo_lite.evaluate.scores import by_prompt, differences, intervals, outcomes, steps
from hapo_lite.evaluate.suites import NAMED, chosen, read_problems
from hapo_lite.recipe import load_recipe
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.train import __main__ as train
from hapo_lite.train.verdict import judge
from tests.commands import ENVIRONMENT
from tests.conftest import ROOT, TINY

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the checkout")
SETTINGS = [
    "--suite",
    "tiny",
    "benchmark.limit=24",
    "benchmark.samples=4",
    "benchmark.temperature=1.0",
    "benchmark.top_p=0.95",
    "rollout.batch_size=16",
    "reward.workers=1",
    "logging.progress=false",
]


def run(*arguments) -> int:
    return run_command(evaluate.main, [str(TINY), *map(str, arguments)])


def remains(folder: Path) -> dict[str, bytes | dict]:
    """What must be the same however often an evaluation was stopped: the samples, and the summaries without times."""
    found: dict[str, bytes | dict] = {}
    for path in sorted((folder / "tiny_cpu" / "evaluations").rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = path.read_bytes()
        elif path.name == "summary.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "adapter")}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """output_dir of a short training run."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ["training.iterations=4", "training.warmup_updates=0", "training.learning_rate=2e-3"]
    quiet = ["evaluation.prompts=0", "logging.progress=false", "reward.workers=1", "rollout.prompts_per_iteration=8"]
    assert run_command(train.main, [str(TINY), f"output_dir={folder}", *settings, *quiet]) == 0
    return folder


@pytest.fixture(scope="module")
def adapter(trained) -> Path:
    return trained / "tiny_cpu" / "adapter"


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory) -> Path:
    """output_dir of a whole evaluation, of the adapter that the run has."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(trained / "tiny_cpu", folder / "tiny_cpu")
    assert run(f"output_dir={folder}", *SETTINGS) == 0
    return folder


# ------------------------------------------------------------------------------------------------- the numbers


def row(*answers: str, gold: str = "7", prompt: str = "p", length: int = 10, cut: int = 0) -> list[Sample]:
    """Samples of one prompt; the last `cut` are cut off and without an answer."""
    full = [
        Sample(prompt, i, gold, "correct" if a == gold else "wrong", a, length + i, False, "")
        for i, a in enumerate(answers)
    ]
    return full + [Sample(prompt, len(full) + i, gold, "unparseable", None, 32, True, "") for i in range(cut)]


def test_the_numbers_by_hand():
    samples = [*row("7", "7", "3", cut=1), *row("5", "5", "7", "8")]
    values = by_prompt(samples, 4)
    assert values["avg@4"].tolist() == [0.5, 0.25] and values["pass@1"].tolist() == [0.5, 0.25]
    # 2 of 4 right: 1 - C(2,2)/C(4,2) = 5/6. 1 of 4: 1 - C(3,2)/C(4,2) = 1/2.
    assert values["pass@2"] == pytest.approx([5 / 6, 0.5])
    assert values["pass@4"].tolist() == [1.0, 1.0]
    # Two votes for 7 against one for 3, none from the sample that was cut off; two for 5 against one each.
    assert values["maj@4"].tolist() == [1.0, 0.0]
    assert values["length"].tolist() == [(10 + 11 + 12 + 32) / 4, 11.5]
    assert values["truncated"].tolist() == [0.25, 0.0]
    assert outcomes(samples) == {"correct": 3, "wrong": 4, "unparseable": 1, "timeout": 0, "error": 0}


def test_wrong_answers_that_are_typed_in_two_ways_are_one_vote():
    assert by_prompt(row("7", r"\dfrac{1}{2}", r"\frac{1}{2}"), 3)["maj@3"].tolist() == [0.0]
    assert by_prompt(row("7", r"\dfrac{1}{2}", r"\frac{1}{3}"), 3)["maj@3"] == pytest.approx([1 / 3])


def test_k_doubles_up_to_n():
    assert steps(8) == [1, 2, 4, 8] and steps(6) == [1, 2, 4, 6] and steps(1) == [1]


def arms(base: list[list[int]], adapter: list[list[int]]):
    """The verdict on right (1) and wrong (0) samples, [P, n] each."""
    values = [
        by_prompt([s for line in grid for s in row(*("7" if right else "3" for right in line))], len(grid[0]))
        for grid in (base, adapter)
    ]
    n = len(base[0])
    figures, change = intervals(values[:1], n), differences(values[:1], values[1:], n)
    return judge(figures, change, n, f"{len(base)} prompts")


@pytest.mark.parametrize(
    ("base", "adapter", "word", "said"),
    [
        # Solves prompts that it never solved, and more often.
        ([[0, 0]] * 20, [[0, 1]] * 20, "improved", "avg@2 rose by 0.500 [0.448, 0.552], pass@2 by 1.000"),
        # Solves the same prompts, every time instead of every other.
        (
            [[0, 1]] * 10 + [[0, 0]] * 10,
            [[1, 1]] * 10 + [[0, 0]] * 10,
            "sharpened",
            "the same ones are solved, more often",
        ),
        ([[0, 1]] * 20, [[1, 1]] * 20, "sharpened", "100 % of them were solved in 2 attempts before"),
        ([[1, 1]] * 20, [[0, 1]] * 20, "worse", "avg@2 fell by 0.500 [0.448, 0.552]"),
        # One prompt more out of twenty is within what other prompts would have given.
        (
            [[0, 0]] * 20,
            [[1, 1]] + [[0, 0]] * 19,
            "no difference",
            "on 20 prompts; less than about 0.117 would not show",
        ),
        ([[0, 0]] * 20, [[0, 0]] * 20, "no difference", "on 20 prompts; less than about 0.052 would not show"),
        (
            [[0]] * 20,
            [[1]] * 20,
            "improved",
            "1.000 [0.895, 1.105] on 20 prompts; none was solved before",
        ),
        # Half are always solved before, and now the others are solved too: more attempts would have found none.
        ([[1, 1], [0, 0]] * 10, [[1, 1]] * 20, "learned", "pass@2 by 0.500"),
        ([[1], [0]] * 10, [[1]] * 20, "improved", "one attempt at each does not tell"),
    ],
)
def test_verdicts(base, adapter, word, said):
    verdict = arms(base, adapter)
    assert verdict.word == word and verdict.sentence.startswith(f"{word}: ") and said in verdict.sentence


def test_noise_is_seldom_called_a_difference():
    """Two models of the same skill: about one pair in twenty gets a verdict, as 95 % intervals promise."""
    rng = np.random.default_rng(0)
    words = []
    for _ in range(40):
        skill = rng.random((40, 1))
        words.append(arms(*((rng.random((40, 2)) < skill).astype(int).tolist() for _ in range(2))).word)
    assert words.count("no difference") >= 34


def test_suites_weigh_alike_in_the_mean():
    easy, hard = by_prompt(row("7", "7") * 30, 2), by_prompt(row("3", "7") * 2, 2)
    assert intervals([easy, hard], 2)["avg@2"].value == 0.75


# ------------------------------------------------------------------------------------------------- the sample file


def test_a_file_cut_anywhere_goes_on_where_whole_parts_end(tmp_path):
    ids = [f"p{i}" for i in range(5)]
    samples = [s for name in ids for s in row("7", "3", prompt=name)]
    whole = SampleFile(tmp_path, "base", {"seed": 0}, ids, 2)
    whole.append(samples[:4])
    whole.append(samples[4:])
    content = whole.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in {*ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1]), 0, 3}:
        whole.path.write_bytes(content[:size])
        again = SampleFile(tmp_path, "base", {"seed": 0}, ids, 2)
        again.resume(at_once=2)
        lines = sum(end <= size for end in ends) - 1
        assert again.done == (5 if lines == 10 else max(lines, 0) // 4 * 2)
        while not again.complete:
            again.append(samples[again.done * 2 : again.done * 2 + 4])
        assert again.path.read_bytes() == content
        assert again.samples == samples


def test_what_is_damaged_or_out_of_place_is_made_again(tmp_path):
    ids = ["a", "b", "c"]
    samples = [s for name in ids for s in row("7", prompt=name)]
    file = SampleFile(tmp_path, "base", {}, ids, 1)
    file.append(samples)
    header, *lines = file.path.read_bytes().splitlines(keepends=True)
    for broken in (lines[0] + lines[2] + lines[1], lines[0] + b"\0" * 40 + b"\n" + lines[2], lines[0] + b'{"a": 1}\n'):
        file.path.write_bytes(header + broken)
        again = SampleFile(tmp_path, "base", {}, ids, 1)
        again.resume(at_once=1)
        assert again.done == 1 and again.path.read_bytes() == header + lines[0]
    file.path.write_bytes(b'{"protocol": {"seed": 1}}\n' + lines[0])
    with pytest.raises(UserError, match="does not begin with the settings that its name stands for"):
        SampleFile(tmp_path, "base", {}, ids, 1).resume(at_once=1)


# ------------------------------------------------------------------------------------------------- whole evaluations


def test_an_evaluation_leaves_samples_and_summaries_that_agree(finished):
    folder = finished / "tiny_cpu" / "evaluations"
    summary = json.loads((folder / "tiny" / "summary.json").read_text())
    correct = {}
    for label, name in summary["files"].items():
        header, *lines = map(json.loads, (folder / "tiny" / name).read_text().splitlines())
        assert len(lines) == 24 * 4 and header["protocol"]["top_p"] == 0.95
        assert (header["protocol"]["adapter_sha256"] is None) == (label == "base")
        correct[label] = [line["outcome"] == "correct" for line in lines]
        assert summary["figures"][label]["avg@4"]["value"] == pytest.approx(np.mean(correct[label]))
        assert summary["outcomes"][label]["correct"] == sum(correct[label])
    change = summary["difference"]["avg@4"]
    assert change["value"] == pytest.approx(np.mean(correct["adapter"]) - np.mean(correct["base"]))
    assert change["low"] < change["value"] < change["high"]
    assert summary["sentence"].startswith(summary["verdict"])
    overall = json.loads((folder / "summary.json").read_text())
    assert overall["suites"] == ["tiny"] and overall["verdict"] == summary["verdict"]


def test_the_base_is_the_model_without_its_adapter(finished, tmp_path):
    """Alone it writes the same bytes as beside an adapter; and the adapter does make a difference."""
    assert run(f"output_dir={tmp_path}", *SETTINGS) == 0
    alone = remains(tmp_path)
    [name] = [name for name in alone if name.endswith(".jsonl")]
    together = remains(finished)
    assert alone[name] == together[name]
    [other] = [name for name in together if "adapter-" in name]
    texts = [[json.loads(line)["text"] for line in together[n].splitlines()[1:]] for n in (name, other)]
    assert sum(a != b for a, b in zip(*texts, strict=True)) > 10
    assert "verdict" not in json.loads((tmp_path / "tiny_cpu" / "evaluations" / "summary.json").read_text())


def test_once_done_it_samples_nothing_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(TransformersEngine, "sample", None)
    before = remains(finished)
    assert run(f"output_dir={finished}", *SETTINGS) == 0
    assert remains(finished) == before
    assert "192 completions are there from before" in capsys.readouterr().out


def test_other_settings_do_not_meet_the_samples_of_these(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert run(f"output_dir={tmp_path}", *SETTINGS, "benchmark.temperature=0.7") == 0
    before, after = remains(finished), remains(tmp_path)
    assert len([n for n in after if n.endswith(".jsonl")]) == 4
    assert all(after[name] == content for name, content in before.items() if name.endswith(".jsonl"))


def test_killed_it_goes_on(finished, adapter, tmp_path, capsys):
    arguments = [f"output_dir={tmp_path}", "--adapter", str(adapter), *SETTINGS]
    command = [sys.executable, "-m", "hapo_lite.evaluate", str(TINY), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "tiny_cpu" / "evaluations" / "tiny"
    while process.poll() is None and not any(p.read_bytes().count(b"\n") > 33 for p in folder.glob("*.jsonl")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (folder / "summary.json").is_file()
    assert run(*arguments) == 0
    assert "completions are there from before" in capsys.readouterr().out
    assert remains(tmp_path) == remains(finished)


@pytest.mark.slow
def test_two_processes_go_on_and_write_what_one_does(finished, adapter, tmp_path):
    shutil.copytree(finished / "tiny_cpu" / "evaluations", tmp_path / "tiny_cpu" / "evaluations")
    for path in (tmp_path / "tiny_cpu" / "evaluations").rglob("summary.json"):
        path.unlink()
    for path in (tmp_path / "tiny_cpu" / "evaluations" / "tiny").glob("*.jsonl"):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:40]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "hapo_lite.evaluate", str(TINY), f"output_dir={tmp_path}", "--adapter", str(adapter)]
    done = subprocess.run([*command, *SETTINGS], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "completions are there from before" in done.stdout
    assert remains(tmp_path) == remains(finished)


def test_asked_to_stop_it_keeps_what_it_has(finished, adapter, tmp_path, monkeypatch, capsys):
    """After the second of the adapter's six parts, of four prompts each; the base's six are done."""
    after = 8
    arguments = [f"output_dir={tmp_path}", "--adapter", adapter, *SETTINGS]
    append, parts = SampleFile.append, []

    def and_then_a_signal(self, samples, write=True):
        append(self, samples, write)
        parts.append(len(samples))
        if len(parts) == after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SampleFile, "append", and_then_a_signal)
    assert run(*arguments) == 128 + signal.SIGINT
    assert "the same command continues from here" in capsys.readouterr().err
    assert len(parts) == after
    assert run(*arguments) == 0
    assert len(parts) == 12  # nothing was sampled twice
    assert remains(tmp_path) == remains(finished)


@needs_data
def test_several_suites_from_files_and_prompts_that_do_not_fit(tmp_path, capsys):
    suites = ["--suite", f"aime24={DATA / 'aime24.parquet'}", "--suite", f"gsm8k={DATA / 'gsm8k_test.parquet'}"]
    few = ["benchmark.limit=12", "benchmark.samples=2", "reward.workers=1", "logging.progress=false"]
    assert run(f"output_dir={tmp_path}", *suites, *few) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "tiny_cpu" / "evaluations"
    aime, gsm = (json.loads((folder / name / "summary.json").read_text()) for name in ("aime24", "gsm8k"))
    assert aime["prompts"] + len(aime["too_long"]["prompts"]) == 12 and aime["too_long"]["more_tokens_than"] == 224
    assert f"prompts left out: longer than 224 tokens ({aime['too_long']['prompts'][0]}, " in printed
    assert sum(gsm["outcomes"]["base"].values()) == 2 * gsm["prompts"]
    assert f"mean of 2 suites, {aime['prompts'] + gsm['prompts']} prompts" in printed
    # The tiny model has never seen such prompts and does not stop.
    assert "of the completions were cut off at 32 tokens; raise benchmark.max_new_tokens" in printed


def test_the_protocol_of_the_paper_is_the_default():
    benchmark = load_recipe(ROOT / "recipes" / "qwen1_5b_lora.yaml").benchmark
    assert (benchmark.samples, benchmark.temperature, benchmark.top_p) == (8, 0.5, 0.7)


def test_suites_by_default_and_by_name():
    qwen = load_recipe(ROOT / "recipes" / "qwen1_5b_lora.yaml")
    assert [s.name for s in chosen(qwen)] == ["aime24", "aime25", "amc23", "math500", "olympiadbench", "minerva"]
    assert {s.name for s in chosen(qwen)} <= NAMED.keys()
    assert [s.name for s in chosen(load_recipe(TINY))] == ["tiny"]
    [mine] = chosen(load_recipe(TINY, ["benchmark.suites=DATA/mine.jsonl"]))
    assert (mine.name, mine.source) == ("mine", "DATA/mine.jsonl")


def test_held_out_prompts_are_those_of_training(make_recipe, make_loop):
    recipe = make_recipe("evaluation.prompts=6", "benchmark.suites=held_out", "benchmark.limit=5")
    held_out = [e.prompt for e in make_loop(recipe).held_out]
    assert list(read_problems(chosen(recipe)[0], recipe).prompts) == held_out[:5]


def test_a_suite_out_of_reach_says_which_setting_chose_it(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    recipe = load_recipe(TINY, ["data.source=mine.csv"])
    with pytest.raises(UserError) as caught:
        read_problems(chosen(recipe)[0], recipe)
    said = str(caught.value)
    assert said.startswith("suite aime24: the hub data set 'HuggingFaceH4/aime_2024', split 'train', cannot be loaded")
    assert "neither --suite nor benchmark.suites names a suite" in said and "data.source" not in said
    assert "--suite held_out asks the run's own held-out prompts, and --suite aime24=FILE" in said
    for suites, advice in (("aime24", ": without the hub"), ("[{name: own, source: a/b}]", "source, config and split")):
        recipe = load_recipe(TINY, [f"benchmark.suites={suites}"])
        with pytest.raises(UserError, match=advice) as caught:
            read_problems(chosen(recipe)[0], recipe)
        assert "neither --suite" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "aime42"], "there is no suite 'aime42': the names are aime24, "),
        (["--suite", "math50"], "did you mean math500?"),
        (["--suite", "nowhere/none.jsonl"], "suite none: there is no data file"),
        (["--suite", "tiny", "--suite", "tiny"], "two suites are named tiny"),
        (["--suite", "../x=y.jsonl"], "must be one folder name"),
        (["--suite", "held_out", "evaluation.prompts=0"], "this recipe holds no prompts out"),
        (["--suite", "tiny", "benchmark.max_new_tokens=254"], "leave 2 of the model's context of 256"),
        (["--suite", "tiny", "--adapter", "nowhere"], "adapter nowhere has no adapter_config.json"),
        (["benchmark.top_p=1.5"], "benchmark.top_p = 1.5"),
        (["rollout.top_p=0.7"], "rollout.top_p below 1 or a rollout.top_k needs method.importance=truncated"),
        (["benchmark.samples=0"], "benchmark.samples = 0"),
        (["--suite", "{folder}/odd.csv"], "suite odd: {folder}/odd.csv has none of the columns"),
        (["--suite", "tiny", "output_dir={folder}/odd.csv"], "cannot be written"),
    ],
)
def test_one_sentence_and_exit_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "odd.csv").write_text("riddle,key\nWhat?,1\n")
    filled = [a.format(folder=tmp_path) for a in arguments]
    assert run(f"output_dir={tmp_path / 'runs'}", *filled) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: ") and message.format(folder=tmp_path) in line
